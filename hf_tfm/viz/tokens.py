"""Token ids as text that people can read."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPACE = "\N{MIDDLE DOT}"
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Tokens as text: a space as a middle dot, special tokens by name.

    Pieces of a byte-level tokenizer are turned back from its byte alphabet ("Ġfür" is " für", shown as "·für"); a
    byte that is no whole character is shown as an escape, ``\\xc3``; an id without a piece as ``<319>``.
    """
    byte_level = uses_bytes(tokenizer)
    special = set(tokenizer.all_special_ids)
    labels = []
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if piece is None:
            piece = f"<{token}>"  # vocabularies of models are often rounded up
        elif token not in special:
            if byte_level and all(letter in BYTES for letter in piece):
                piece = bytes(BYTES[letter] for letter in piece).decode("utf-8", errors="backslashreplace")
            # SentencePiece writes a space as a low bar.
            piece = piece.replace("\N{LOWER ONE EIGHTH BLOCK}", SPACE).replace(" ", SPACE)
            piece = piece.replace("\n", "\\n").replace("\t", "\\t")
        labels.append(piece)
    return labels


def uses_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether pieces are written in the byte alphabet of GPT-2."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    # A chain of decoders shows its parts in its state only.
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
