"""Shared helpers of the BERT and GPT conversion tests: small random models and their outputs."""

import torch
from convert_helpers import LABELS
from detr_helpers import drawn
from torch import Tensor, nn
from transformers import BertTokenizer, PreTrainedModel

from hf_tfm.conversion import conversions
from hf_tfm.conversion.conversion import Conversion

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##ed", "##ing", "the", "one"]
LIBRARIES = ("bert", "distilbert", "tinybert", "gpt2")
BY_NAME = {f"{c.name}-{c.ours.__name__}": c for c in conversions() if c.name in LIBRARIES}
OUTPUTS = (
    *("logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits"),
    *("last_hidden_state", "pooler_output"),
)


def plain_fields(conversion: Conversion) -> dict:
    """Fields of our configuration that the other side of ``conversion`` can express."""
    labels = {} if conversion.ours.__name__.endswith("QuestionAnswering") else LABELS
    if conversion.name == "gpt2":
        return {**SHAPE, **LABELS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    classifier = conversion.ours.__name__.endswith(("SequenceClassification", "MultipleChoice"))
    pooler = {"distilbert": "relu" if classifier else "none", "tinybert": "tanh_relu" if classifier else "tanh"}
    return {
        **SHAPE,
        **labels,
        "intermediate_size": 48,
        "pooler": pooler.get(conversion.name, "tanh"),
        "type_vocab_size": 0 if conversion.name == "distilbert" else 2,
    }


def ours(conversion: Conversion, **fields) -> PreTrainedModel:
    """A random model of our side of ``conversion``."""
    config = conversion.ours.config_class(**{**plain_fields(conversion), **fields})
    return drawn(conversion.ours(config))


def theirs(conversion: Conversion, **fields) -> PreTrainedModel:
    """A random model of the other side."""
    plain = {"gpt2": {"n_inner": 48}, "distilbert": {"hidden_dim": 48}}.get(conversion.name, {"intermediate_size": 48})
    labels = {} if conversion.ours.__name__.endswith("QuestionAnswering") else LABELS
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if conversion.name == "gpt2" else {}
    config = conversion.theirs.config_class(**{**SHAPE, **plain, **labels, **tokens, **fields})
    return drawn(conversion.theirs(config))


@torch.no_grad()
def outputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Outputs on inputs that the conversion's own check does not use."""
    ids = torch.randint(1, 50, (2, 40), generator=torch.Generator().manual_seed(7))
    ids[1, 23:] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if getattr(model.config, "type_vocab_size", 0):
        inputs["token_type_ids"] = (torch.arange(40) > 11).long().expand(2, -1)
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: value[None] for name, value in inputs.items()}
    output = model.eval()(**inputs)
    return {name: output[name] for name in OUTPUTS if output.get(name) is not None}


def assert_same_outputs(found: dict, expected: dict) -> None:
    """Outputs agree within 1e-5 of their size."""
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert value.std() > 0.02, f"{name} too similar for a meaningful comparison"
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-5, msg=name)


def tokenizer() -> BertTokenizer:
    """A tokenizer with a few words."""
    return BertTokenizer({word: index for index, word in enumerate(WORDS)})
