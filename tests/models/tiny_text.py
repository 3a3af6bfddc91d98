"""Small random BERT and GPT models, batches for every head, and toy languages, shared by the model tests."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_tfm
from hf_tfm.models.cross_entropy import IGNORE_INDEX

TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "pad_token_id": 0,
}
GPT = {**TINY, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "pretraining": (hf_tfm.TfmBertForPreTraining, TINY),
    "masked": (hf_tfm.TfmBertForMaskedLM, {**TINY, "type_vocab_size": 0, "pooler": "none"}),
    "classifier": (hf_tfm.TfmBertForSequenceClassification, {**TINY, "pooler": "relu"}),
    "tagger": (hf_tfm.TfmBertForTokenClassification, TINY),
    "chooser": (hf_tfm.TfmBertForMultipleChoice, {**TINY, "pooler": "tanh_relu"}),
    "reader": (hf_tfm.TfmBertForQuestionAnswering, TINY),
    "causal": (hf_tfm.TfmGPTForCausalLM, GPT),
    "post-norm": (hf_tfm.TfmGPTForCausalLM, {**GPT, "norm_first": False, "hidden_act": "gelu"}),
    "causal-classifier": (hf_tfm.TfmGPTForSequenceClassification, GPT),
}


def tiny_text(name: str, seed: int = 0, **fields) -> PreTrainedModel:
    """A model of `MODELS` in evaluation mode with all weights random, because default biases of 0 would hide bugs."""
    model_class, plain = MODELS[name]
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**plain, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text_batch(name: str, rows: int = 3, length: int = 9, seed: int = 0, loss: bool = False) -> dict[str, Tensor]:
    """Ids (B, T) with masks of different lengths, the first row full; with ``loss``, labels of every kind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    ids = ids.masked_fill(mask == 0, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not MODELS[name][0].__name__.startswith("TfmGPT"):
        inputs["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(rows, -1)
    if name == "chooser":
        inputs = {key: value[None] for key, value in inputs.items()}
    if not loss:
        return inputs
    tokens = {"labels": ids.masked_fill((mask == 0) | (ids % 2 == 0), IGNORE_INDEX)}
    labels = {
        "pretraining": {**tokens, "next_sentence_label": torch.arange(rows) % 2},
        "classifier": {"labels": torch.arange(rows) % 3},
        "causal-classifier": {"labels": torch.arange(rows) % 3},
        "tagger": {"labels": tokens["labels"].remainder(3).where(tokens["labels"] > 0, IGNORE_INDEX)},
        "chooser": {"labels": torch.tensor([rows - 1])},
        "reader": {"start_positions": torch.arange(rows) % 2, "end_positions": torch.ones(rows, dtype=torch.long)},
    }
    return {**inputs, **labels.get(name, tokens)}


def main_output(output) -> Tensor:
    """The logits of any head."""
    names = ("logits", "prediction_logits", "start_logits", "last_hidden_state")
    return next(output[name] for name in names if output.get(name) is not None)


def gradients(model: PreTrainedModel) -> Tensor:
    """All gradients in one vector; 0 for parameters without a gradient."""
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])


def progressions(rows: int, length: int, seed: int, words: int = 11, first: int = 5) -> Tensor:
    """A toy language (B, T): each token is the previous one plus the text's own step, 1 to 4, modulo ``words``.

    Any two tokens of a text and their positions determine the others; a single token determines none.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(words, (rows, 1), generator=generator)
    step = torch.randint(1, 5, (rows, 1), generator=generator)
    return first + (start + step * torch.arange(length)) % words


def twice(rows: int, half: int, seed: int, words: int = 11, first: int = 5, mask_id: int = 4) -> dict[str, Tensor]:
    """A toy language whose texts (B, 2 half) repeat their first half, with a quarter of the tokens masked.

    A masked token is always visible ``half`` positions away, and nowhere else.
    """
    generator = torch.Generator().manual_seed(seed)
    half_ids = torch.randint(first, first + words, (rows, half), generator=generator)
    chance = torch.rand(rows, half, generator=generator)
    hidden = torch.cat([chance < 0.25, chance > 0.75], dim=1)  # (B, 2 half)
    ids = torch.cat([half_ids, half_ids], dim=1)
    return {"input_ids": ids.masked_fill(hidden, mask_id), "labels": ids.masked_fill(~hidden, IGNORE_INDEX)}
