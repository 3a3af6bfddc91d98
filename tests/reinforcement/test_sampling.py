"""Completions depend on the random numbers of their prompt alone, and follow the model's distribution."""

import numpy as np
import pytest
import torch
from models.tiny_text import GPT, tiny_text
from transformers import GPT2Config, GPT2LMHeadModel

from hf_tfm.reinforcement.sampling import sample

PROMPTS = [np.array(ids) for ids in ([5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [5, 6])]
ENDS = [2, 3, 4, 16, 17]


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": GPT["vocab_size"]}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5)
    return model.eval()


@pytest.fixture(params=["ours", "transformers"])
def model(request):
    return tiny_text("causal") if request.param == "ours" else gpt2()


def uniforms(copies: int, longest: int = 12) -> np.ndarray:
    return np.random.default_rng(0).random((len(PROMPTS) * copies, longest), dtype=np.float32)


def reference(model, prompt, draws, temperature=1.0):
    """One token at a time, from the whole text, without a cache."""
    ids = prompt.tolist()
    for draw in draws:
        scores = model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature
        ids.append(int((scores.softmax(-1).cumsum(-1) < draw).sum()))
        if ids[-1] in ENDS:
            break
    return ids[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [None, 4])
def test_completions_equal_those_of_one_text_at_a_time(model, batch_size):
    draws = uniforms(copies=2)
    found, log_probs = sample(model, PROMPTS, draws, ENDS, 0, temperature=0.8, batch_size=batch_size)
    expected = [reference(model, PROMPTS[i // 2], draws[i], 0.8) for i in range(len(draws))]
    assert [one.tolist() for one in found] == expected
    ids = torch.as_tensor([*PROMPTS[3], *expected[6]])[None]  # copy 0 of prompt 3
    exact = (model(input_ids=ids).logits[0, 1:-1] / 0.8).log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0]
    torch.testing.assert_close(torch.as_tensor(log_probs[6]), exact, rtol=1e-4, atol=1e-5)
    assert len({len(one) for one in expected}) > 2, "completions of different lengths"


def test_temperature_0_is_greedy(model):
    found = sample(model, PROMPTS[:1], uniforms(1)[:1], ENDS, 0, temperature=0.0)[0][0]
    ids = torch.as_tensor(PROMPTS[0])[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}
    assert found.tolist() == model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 3:].tolist()


def test_samples_follow_the_distribution():
    model, count = tiny_text("causal"), 4_000
    draws = np.random.default_rng(1).random((count, 1), dtype=np.float32)
    tokens = np.concatenate(sample(model, PROMPTS[:1], draws, ENDS, 0)[0])
    with torch.no_grad():
        expected = model(input_ids=torch.as_tensor(PROMPTS[0])[None]).logits[0, -1].softmax(-1).numpy()
    found = np.bincount(tokens, minlength=len(expected)) / count
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / count)
