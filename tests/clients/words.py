"""A tokenizer of 40 words for the tiny text models, whose vocabulary has 48 tokens."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
WORDS = tuple(f"w{i}" for i in range(40))
TEXTS = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11 w12", "w13"]
ROLES = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}


def tokenizer(side: str = "right", **roles: str) -> PreTrainedTokenizerFast:
    """Splits at spaces and adds no special tokens; [PAD], [CLS] and [SEP] are 0, 1 and 2."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side=side, model_max_length=24, **{**ROLES, **roles}
    )
