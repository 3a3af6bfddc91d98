"""Human-readable labels of token ids."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPACE = "\N{MIDDLE DOT}"
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Convert tokens to text, with a space as a middle dot and special tokens by name.

    Pieces of a byte-level tokenizer are decoded from its byte alphabet ("Ġfür" is " für", shown as "·für"); a byte
    that is not a complete character is shown as an escape, ``\\xc3``; an id without a piece as ``<319>``.
    """
    byte_level = uses_bytes(tokenizer)
    special = set(tokenizer.all_special_ids)
    labels = []
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if piece is None:
            piece = f"<{token}>"  # models often pad their vocabulary beyond the tokenizer's
        elif token not in special:
            if byte_level and all(letter in BYTES for letter in piece):
                piece = bytes(BYTES[letter] for letter in piece).decode("utf-8", errors="backslashreplace")
            # SentencePiece represents a space as a lower one eighth block.
            piece = piece.replace("\N{LOWER ONE EIGHTH BLOCK}", SPACE).replace(" ", SPACE)
            piece = piece.replace("\n", "\\n").replace("\t", "\\t")
        labels.append(piece)
    return labels


def uses_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if pieces use the byte alphabet of GPT-2."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    # A sequence of decoders exposes its parts only in its state.
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
