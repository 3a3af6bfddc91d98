"""Greedy decoding of a decoder-only model equals transformers' loop, but skips finished rows."""

import pytest
import torch
from transformers import DynamicCache

import hf_tfm.models.generation as generation
from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.models.cache_names import CACHE_NAME

ENDS = list(range(5, 48, 4))


def varied_model(**fields):
    """A model whose outputs vary and end at different lengths."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    tokens = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(3)
    model = TfmGPTForCausalLM(TfmGPTConfig(**sizes, **tokens, tie_word_embeddings=False, **fields)).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    model.generation_config.eos_token_id = ENDS
    return model


def prompts(rows: int = 12, padded: bool = True) -> dict:
    """Prompts of different lengths, left-padded."""
    ids = torch.randint(3, 48, (rows, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, : row % 6] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def reference_greedy(model, batch: dict, max_new_tokens: int) -> torch.Tensor:
    """Minimal greedy search: no cache, one text at a time, no padding."""
    results = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[None, mask.bool()]
        start = row.shape[1]
        while row.shape[1] < start + max_new_tokens and (row.shape[1] == start or int(row[0, -1]) not in ENDS):
            row = torch.cat([row, model(row).logits[:, -1].argmax(-1)[:, None]], dim=1)
        results.append(row[0, start:])
    return torch.nn.utils.rnn.pad_sequence(results, batch_first=True)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("fields", [{}, {"norm_first": False}], ids=["pre-norm", "post-norm"])
@torch.no_grad()
def test_greedy_matches_the_reference(fields, padded):
    model, batch = varied_model(**fields), prompts(padded=padded)
    expected = reference_greedy(model, batch, 12)
    assert len({int(row.count_nonzero()) for row in expected}) > 1, "the texts must end at different places"
    assert torch.equal(model.generate(**batch, max_new_tokens=12)[:, 9:], expected)


def test_finished_texts_are_dropped(monkeypatch):
    model, batch = varied_model(), prompts()
    rows = []
    model.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    short = model.generate(**batch, max_new_tokens=12)
    assert rows[0] == 12 and rows[-1] < 12 and rows == sorted(rows, reverse=True)
    rows.clear()
    monkeypatch.setattr(generation, "greedy_suits", lambda *_: False)
    assert torch.equal(model.generate(**batch, max_new_tokens=12), short)
    assert set(rows) == {12}, "transformers' loop computes all rows"


@pytest.mark.parametrize(
    "asked",
    [
        {"min_new_tokens": 5},
        {"repetition_penalty": 2.5},
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 9},
        {"eos_token_id": None},
        {"max_length": 14, "max_new_tokens": None},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_supported_options(asked, monkeypatch):
    model, batch = varied_model(), prompts()
    if "eos_token_id" in asked:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        asked = {}
    got = model.generate(**batch, **{"max_new_tokens": 12, **asked})
    monkeypatch.setattr(generation, "greedy_suits", lambda *_: False)
    assert torch.equal(got, model.generate(**batch, **{"max_new_tokens": 12, **asked}))


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True},
        {"return_dict_in_generate": True},
        {"num_beams": 2},
        {"logits_processor": [lambda ids, scores: scores]},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_other_options_use_transformers_loop(asked, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this call needs transformers' own loop")

    monkeypatch.setattr(generation, "greedy", refuse)
    varied_model().generate(**prompts(), max_new_tokens=4, **asked)


def test_generation_continues_from_a_filled_cache():
    model, batch = varied_model(), prompts(padded=False)
    whole = model.generate(**batch, max_new_tokens=6)
    cache = DynamicCache()
    with torch.no_grad():
        model(batch["input_ids"][:, :5], **{CACHE_NAME: cache}, use_cache=True)
    assert torch.equal(model.generate(**batch, **{CACHE_NAME: cache}, max_new_tokens=6), whole)
