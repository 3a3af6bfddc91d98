"""Reinforcement learning: scores of completions, exact resume within a rollout, budgets, and learning."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import rlhf_ranks
import torch
from datasets import Dataset
from models.tiny_text import TINY
from processes import run_ranks
from recipe_helpers import fresh_state
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed

import hf_tfm
from hf_tfm.reinforcement.rollout import EpisodeCollator, pack, unpack
from hf_tfm.tasks.actor_critic import TokenValues
from hf_tfm.tasks.completions import completion_log_probs
from hf_tfm.tasks.evaluation import evaluate
from hf_tfm.tasks.rlhf import RLHFArguments, RLHFTask
from hf_tfm.training.checkpoint import checkpoints
from hf_tfm.training.trainer import Runs

WORDS = ["<pad>", "<s>", "</s>", *"abcdefgh"]
FIELDS = {**TINY, "vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2}


def first_letter(prompts, completions, **columns):
    """1 if a completion begins with the letter of its prompt; the reward of the learning test."""
    return [float(text.strip()[:1] == prompt[:1]) for prompt, text in zip(prompts, completions, strict=True)]


@pytest.fixture(scope="module")
def models_and_data(tmp_path_factory):
    """Folders: a random policy with dropout, a random reward model, prompts of one letter, and texts."""
    folder = tmp_path_factory.mktemp("rlhf")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    set_seed(0)
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    policy = hf_tfm.TfmGPTForCausalLM(hf_tfm.TfmGPTConfig(**{**FIELDS, **rates}))
    reward = hf_tfm.TfmGPTForSequenceClassification(hf_tfm.TfmGPTConfig(**{**FIELDS, "num_labels": 1}))
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    for split in ("train", "validation"):
        path = folder / "prompts" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_list([{"prompt": letter} for letter in "abcd"]).to_json(path)
        path = folder / "texts" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_list([{"text": "abcdefgh" * 4}] * 4).to_json(path)
    return folder


def arguments(folder, output_dir, **options):
    given = {
        "dataset_name": str(folder / "prompts"),
        "model_name_or_path": str(folder / "policy"),
        "reward_functions": ["test_rlhf:first_letter"],
        "output_dir": str(output_dir),
        "max_new_tokens": 6,
        "batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "progress": False,
        **options,
    }
    return RLHFArguments(**given)


def fit(args):
    fresh_state()
    return Runs(RLHFTask, "rlhf_train", [])(args)


def rows(folder):
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "items_per_second")} for row in lines]


def batch_of(folder, count: int = 3):
    """Episodes of different lengths, and their batch."""
    random = np.random.default_rng(0)
    sizes = [(1 + i, 5 - 2 * i) for i in range(count)]
    episodes = [{"prompt": random.integers(3, 11, a), "completion": random.integers(3, 11, b)} for a, b in sizes]
    return episodes, EpisodeCollator(0)(episodes, range(count), 0)


@torch.no_grad()
def test_log_probs_and_values_are_those_of_each_text_alone(models_and_data):
    policy = hf_tfm.TfmGPTForCausalLM.from_pretrained(models_and_data / "policy").eval()
    values = TokenValues(hf_tfm.TfmGPTForSequenceClassification.from_pretrained(models_and_data / "reward").eval())
    episodes, batch = batch_of(models_and_data)
    log_probs, of_tokens = completion_log_probs(policy, batch, 0.7), values.of_completions(batch)
    for i, episode in enumerate(episodes):
        ids = torch.as_tensor(np.concatenate([episode["prompt"], episode["completion"]]))[None]
        start, size = len(episode["prompt"]), len(episode["completion"])
        logits = (policy(input_ids=ids).logits[0, start - 1 : -1] / 0.7).log_softmax(-1)
        expected = logits.gather(1, ids[0, start:, None])[:, 0]
        torch.testing.assert_close(log_probs[i, :size], expected)
        assert log_probs[i, size:].eq(0).all() and of_tokens[i, size:].eq(0).all()
        score = values.classifier(input_ids=ids).logits[0, 0]
        torch.testing.assert_close(values.of_last(batch)[i], score)
        states = values.classifier.transformer(input_ids=ids).last_hidden_state[0, start - 1 : -1]
        torch.testing.assert_close(of_tokens[i, :size], values.classifier.score(states)[:, 0])


def test_packed_episodes_are_restored_exactly():
    episodes = [{"prompt": np.arange(i + 1), "reward": np.float32([i / 3])} for i in range(3)]
    for before, after in zip(episodes, unpack(pack(episodes)), strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in ("prompt", "reward"))
    with pytest.raises(ValueError, match=r"lengths of prompt"):
        unpack({"prompt": torch.arange(3), "prompt.lengths": torch.tensor([1])})


PPO = {"algorithm": "ppo", "generation_batch_size": 4, "batch_size": 2, "num_iterations": 2, "max_steps": 6}
TEXTS = {"ptx_per_episode": 1, "text_length": 16}


def ppo(folder, output_dir, **options):
    """Two rollouts of four steps; the second is left after two. With a reward model, texts and an average."""
    texts = [{"dataset_name": str(folder / "texts")}]
    models = {"reward_model": str(folder / "reward"), "pretraining_texts": texts, "validation_texts": texts}
    return arguments(folder, output_dir, **{**PPO, **TEXTS, **models, "ema_decay": 0.9, "save_steps": 1, **options})


@pytest.fixture(scope="module")
def whole(models_and_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(ppo(models_and_data, folder))
    return folder


@pytest.mark.parametrize("killed_at", [2, 5])
def test_a_run_killed_within_a_rollout_ends_bit_equal(models_and_data, whole, tmp_path, monkeypatch, killed_at):
    """Killed in the first and in the second rollout, with a checkpoint within the rollout."""
    calls = iter(range(100))
    losses = RLHFTask.losses

    def killing(self, model, batch):
        if "starts" not in batch and next(calls) == killed_at:
            raise KeyboardInterrupt
        return losses(self, model, batch)

    args = ppo(models_and_data, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RLHFTask, "losses", killing)
        fit(args)
    last = checkpoints(tmp_path / "run")[-1]
    assert last.name == f"step-{killed_at:08d}" and (last / "task.safetensors").stat().st_size > 1000
    fit(args)
    assert rows(tmp_path / "run") == rows(whole)
    for name in ("model.safetensors", f"checkpoints/{checkpoints(whole)[-1].name}/ema.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_history_starts_at_the_reference(whole):
    steps = [row for row in rows(whole) if "loss" in row]
    first = steps[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-5) and first["clip_fraction"] == 0.0
    assert {"loss/policy", "loss/value", "loss/ptx", "ptx_loss"} <= first.keys()
    assert {"reward", "entropy", "length", "ended"} <= first.keys()
    assert first["loss"] == pytest.approx(sum(first[f"loss/{term}"] for term in ("policy", "value", "ptx")))
    assert first["loss/ptx"] == pytest.approx(27.8 * first["ptx_loss"], rel=1e-5)
    assert abs(steps[-1]["kl"]) > 1e-4
    scores = [row["evaluation"] for row in rows(whole) if "evaluation" in row][-1]
    assert {"reward", "kl", "length", "ended", "lm_loss", "generated_tokens"} <= scores.keys()


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_micro_batches_do_not_change_a_step(models_and_data, tmp_path, algorithm):
    options = {"algorithm": algorithm, "num_generations": 2, "batch_size": 8, "beta": 0.1, "max_steps": 2}
    for name, micro in (("whole", None), ("parts", 3)):
        more = {"micro_batch_size": micro, "generation_micro_batch_size": micro and 4}
        more["reward_model"] = str(models_and_data / "reward")
        fit(arguments(models_and_data, tmp_path / name, **options, **more))
    whole, parts = (rows(tmp_path / name)[0] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_and_score_as_one(models_and_data, whole, tmp_path, fsdp):
    args = ppo(models_and_data, tmp_path / "run", fsdp=fsdp)
    (tmp_path / "arguments.json").write_text(json.dumps(asdict(args)))
    run_ranks(rlhf_ranks.main, tmp_path)
    for one, two in zip(rows(whole), rows(tmp_path / "run"), strict=True):
        one, two = (row.pop("evaluation", {}) | row for row in (one, two))
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


def test_training_stops_when_the_tokens_are_used_up(models_and_data, tmp_path, capsys):
    args = arguments(models_and_data, tmp_path / "run", max_steps=100, batch_size=2, max_generated_tokens=30)
    fit(args)
    found = rows(tmp_path / "run")[-1]
    assert 30 <= found["evaluation"]["generated_tokens"] < 30 + 2 * 6 and found["step"] < 20
    fit(args)  # the same command only scores
    assert rows(tmp_path / "run")[-1] == found


def test_a_policy_with_randomness_left_is_refused(models_and_data, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tfm.tasks.rlhf.disable_dropout", lambda model: None)
    with pytest.raises(ValueError, match=r"probability ratio of the untrained policy from itself is not 0"):
        fit(arguments(models_and_data, tmp_path / "run", algorithm="ppo"))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_the_true_reward_rises(models_and_data, tmp_path, algorithm):
    """A policy that begins at random learns to repeat the letter of its prompt."""
    options = {"num_generations": 8, "batch_size": 32, "max_new_tokens": 2, "beta": 0.01, "max_steps": 40}
    fit(arguments(models_and_data, tmp_path / "run", algorithm=algorithm, learning_rate=5e-3, **options))
    found = [row["reward"] for row in rows(tmp_path / "run") if "reward" in row]
    assert np.mean(found[:3]) < 0.4 and np.mean(found[-3:]) > 0.9


def test_best_of_n_and_the_options_of_an_evaluation(models_and_data):
    fresh_state()
    folder = models_and_data
    options = {"dataset_name": str(folder / "prompts"), "split": "validation", "max_new_tokens": 6, "progress": False}
    more = {"reward_model": str(folder / "reward"), "true_reward": "test_rlhf:first_letter"}
    one, best = (evaluate(str(folder / "policy"), **options, **more, best_of=n) for n in (1, 16))
    scores = [{row["name"]: row["value"] for row in result["metrics"]} for result in (one, best)]
    assert scores[1]["reward"] > scores[0]["reward"] and {"true_reward", "length", "ended"} <= scores[0].keys()
    assert one["rows"] == best["rows"] == 4 and best["generated_tokens"] > one["generated_tokens"]
    same = evaluate(str(folder / "policy"), **options, reference_model=str(folder / "policy"), seed=3)
    assert {row["name"]: row["value"] for row in same["metrics"]}["kl"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_functions": []}, "give reward_model or reward_functions"),
        ({"reward_functions": ["speling"]}, 'got "speling"; did you mean spelling?'),
        ({"reward_functions": ["no_such_module:f"]}, "module no_such_module cannot be imported"),
        ({"algorithm": "rloo", "num_generations": 1}, "num_generations must be at least 2 for rloo"),
        ({"generation_batch_size": 6}, "generation_batch_size must be a multiple of batch_size = 4, got 6"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights must be one for each of the 1 rewards, got 2"),
        ({"metric_for_best_model": "lm_loss"}, 'metric_for_best_model must be one of reward, got "lm_loss"'),
    ],
)
def test_bad_options(tmp_path, models_and_data, options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        arguments(models_and_data, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 40}, "max_new_tokens = 40 is too long after prompt 0 of split train with 1 tokens"),
        ({"generation_batch_size": 8, "num_generations": 1}, "must be at most the 4 prompts of train, got 8 / 1"),
        ({"prompt_column": "question"}, 'prompt_column "question"'),
        ({"reward_model": "policy"}, r"one label|no weights"),
    ],
)
def test_bad_inputs(tmp_path, models_and_data, options, message):
    if "reward_model" in options:
        options = {"reward_model": str(models_and_data / options["reward_model"])}
    with pytest.raises(ValueError, match=message):
        fit(arguments(models_and_data, tmp_path / "run", **options))
