"""Supervised fine-tuning, reward models and preference optimization: losses, counts and log-probabilities."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import logsigmoid
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM, TfmGPTForSequenceClassification
from hf_tfm.data.vocabulary import train_bytes
from hf_tfm.tasks.completions import RankingCollator, completion_log_probs, disable_dropout
from hf_tfm.tasks.preference_optimization import PreferenceTask
from hf_tfm.tasks.reward_modeling import RewardTask, shift_rewards
from hf_tfm.tasks.supervised_fine_tuning import DemonstrationCollator, FineTuningTask

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
NATIVE = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **TOKENS}


def ours(kind=TfmGPTForCausalLM, **fields):
    torch.manual_seed(0)
    return kind(TfmGPTConfig(**SIZE, **TOKENS, max_position_embeddings=64, **fields)).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, **TOKENS, max_position_embeddings=64)).eval()


def gpt2(kind=GPT2LMHeadModel, **fields):
    torch.manual_seed(0)
    return kind(GPT2Config(**NATIVE, **fields)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return train_bytes(["a"], 258)


def ranking(*completions, scores=(1.0, 0.0), prompt=(5, 6, 7)):
    return {"prompt_ids": list(prompt), "completion_ids": [list(one) for one in completions], "scores": list(scores)}


PAIRS = [ranking([8, 9, 0], [10, 0]), ranking([11, 0], [12, 13, 14, 15, 0], prompt=[20])]


@pytest.fixture
def batch(tokenizer):
    return RankingCollator(tokenizer)(PAIRS, [4, 2], 0)


def alone(model, prompt, completion):
    """Log-probability of a completion, computed without padding."""
    ids = torch.tensor([[*prompt, *completion]])
    log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return log_probs[len(prompt) - 1 :].sum()


@pytest.mark.parametrize("make", [ours, llama, gpt2])
@torch.no_grad()
def test_log_probabilities_do_not_depend_on_padding(make, batch):
    model = make()
    expected = [alone(model, pair["prompt_ids"], one) for pair in PAIRS for one in pair["completion_ids"]]
    torch.testing.assert_close(completion_log_probs(model, batch).sum(1), torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_ranking_batches(batch, tokenizer):
    assert batch["pairs"].tolist() == [[0, 1], [2, 3]] and batch["indices"].tolist() == [4, 2]
    assert batch["starts"].tolist() == [3, 3, 1, 1] and batch["mask"].sum(1).tolist() == [3, 2, 2, 5]
    four = ranking([8], [9], [10], [11], scores=(1.0, 0.5, 0.0, 0.0))
    found = RankingCollator(tokenizer)([PAIRS[0], four], [0, 1], 0)
    assert len(found["pairs"]) == 1 + 5 and found["pair_weights"].tolist() == pytest.approx([1.0] + [0.2] * 5)
    empty = RankingCollator(tokenizer)(PAIRS, [0, 1], 0, is_dummy=True)
    assert (len(empty["pairs"]), empty["prompts"], len(empty["indices"])) == (0, 0, 0)


# Supervised fine-tuning


def demonstrations(*lengths):
    return [{"input_ids": list(range(5, 5 + p + c)), "completion_mask": [0] * p + [1] * c} for p, c in lengths]


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("make", [ours, llama])
def test_token_losses(make, weight, tokenizer):
    model, rows = make(), demonstrations((3, 4), (1, 2))
    task = FineTuningTask.for_model(model, tokenizer, prompt_loss_weight=weight, output_dir="", max_steps=1)
    batch = DemonstrationCollator(tokenizer, weight)(rows, [0, 1], 0)
    total = weights = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        own = torch.tensor([1.0 if one else weight for one in row["completion_mask"][1:]])
        total, weights = total - (own * log_probs).sum(), weights + own.sum()
    assert task.count(batch)["token"] == pytest.approx(weights.item())
    torch.testing.assert_close(task.losses(model, batch)["token"], total, rtol=1e-5, atol=1e-5)
    dummy = DemonstrationCollator(tokenizer, weight)(rows, [0, 1], 0, is_dummy=True)
    assert task.count(dummy)["token"] == 0


# Reward models


def test_reward_losses_are_means_over_the_pairs_of_a_prompt(tokenizer):
    model = ours(TfmGPTForSequenceClassification, num_labels=1)
    task = RewardTask.for_model(model, tokenizer, center_rewards_coefficient=0.1, output_dir="", max_steps=1)
    rows = [PAIRS[0], ranking([8, 0], [9, 0], [10, 0], scores=(2.0, 1.0, 0.0))]
    batch = RankingCollator(tokenizer)(rows, [0, 1], 0)
    one, other = ([model(torch.tensor([[5, 6, 7, *c]])).logits[0, 0] for c in row["completion_ids"]] for row in rows)

    def loss(better, worse):
        return -logsigmoid(better - worse) + 0.1 * (better + worse) ** 2

    expected = loss(*one) + (loss(other[0], other[1]) + loss(other[0], other[2]) + loss(other[1], other[2])) / 3
    assert task.count(batch) == {"prompt": 2}
    torch.testing.assert_close(task.losses(model, batch)["prompt"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ours(TfmGPTForSequenceClassification, num_labels=1),
        lambda: ours(TfmGPTForSequenceClassification, num_labels=1, norm_first=False),
        lambda: gpt2(GPT2ForSequenceClassification, num_labels=1),
    ],
    ids=["gpt", "post-norm", "gpt2"],
)
@torch.no_grad()
def test_rewards_are_shifted_by_a_constant(make):
    model, ids = make(), torch.randint(2, 258, (4, 9))
    before = model(ids).logits
    shift_rewards(model, 2.5)
    torch.testing.assert_close(model(ids).logits, before + 2.5, rtol=1e-4, atol=1e-4)


# Preference optimization


def preference_task(model, tokenizer, **options):
    task = PreferenceTask.for_model(model, tokenizer, output_dir="", train_split="train", max_steps=1, **options)
    task.accelerator = Accelerator(cpu=True)
    return task


SCORES = torch.tensor([[-4.0, -5.0], [-9.0, -3.0]]), torch.tensor([[-4.5, -4.0], [-8.0, -6.0]])  # policy, reference


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, lambda d, mean: -logsigmoid(0.5 * d)),
        ({"label_smoothing": 0.2}, lambda d, mean: -0.8 * logsigmoid(0.5 * d) - 0.2 * logsigmoid(-0.5 * d)),
        ({"loss_type": "hinge"}, lambda d, mean: torch.relu(1 - 0.5 * d)),
        ({"loss_type": "ipo"}, lambda d, mean: (mean - 1.0) ** 2),
        (
            {"loss_type": "robust", "label_smoothing": 0.2},
            lambda d, mean: (-0.8 * logsigmoid(0.5 * d) + 0.2 * logsigmoid(-0.5 * d)) / 0.6,
        ),
    ],
    ids=["dpo", "conservative", "hinge", "ipo", "robust"],
)
def test_pair_losses(options, loss, batch, tokenizer):
    task = preference_task(ours(), tokenizer, beta=0.5, **options)
    ratios = SCORES[0] - SCORES[1]
    lengths = torch.tensor([[3.0, 2.0], [2.0, 5.0]])
    mean = (ratios / lengths).diff(dim=1)[:, 0].neg()
    expected = loss(ratios[:, 0] - ratios[:, 1], mean)
    torch.testing.assert_close(task.pair_losses(ratios, batch), expected)


@pytest.mark.parametrize("make", [ours, llama, lambda: gpt2(attn_pdrop=0.3)], ids=["gpt", "llama", "gpt2"])
def test_a_policy_starts_with_rewards_of_exactly_0(make, tokenizer):
    model = make().train()
    task = preference_task(model, tokenizer)
    disable_dropout(model)
    collate = RankingCollator(tokenizer)
    batches = [collate(PAIRS, [0, 1], 0), collate(PAIRS[:1], [2], 0)]
    loader = SimpleNamespace(examples=range(3), epoch=lambda epoch: iter([[one] for one in batches]))
    task.reference = {"train": task.log_probs_of(model, loader)}
    task.check_equal(model, loader)
    for batch in batches:
        _, ratios = task.log_ratios(model.train(), batch, "train")
        assert (ratios == 0).all()
        assert task.losses(model, batch)["pair"].item() == pytest.approx(len(ratios) * math.log(2))


def test_remaining_dropout_is_found(tokenizer):
    model = ours(attention_probs_dropout_prob=0.5).train()
    task = preference_task(model, tokenizer)
    loader = SimpleNamespace(
        examples=range(2), epoch=lambda epoch: iter([[RankingCollator(tokenizer)(PAIRS, [0, 1], 0)]])
    )
    task.reference = {"train": task.log_probs_of(model, loader)}
    with pytest.raises(ValueError, match="the policy must equal its reference before training"):
        task.check_equal(model.train(), loader)
