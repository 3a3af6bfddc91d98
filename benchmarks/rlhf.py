"""Reinforcement learning: completion tokens per second of rlhf_train against trl's RLOOTrainer and GRPOTrainer.

python -m benchmarks rlhf [--model RUN --max_new_tokens 48]            needs pip install trl

One step samples completions, scores them with a Python function, computes log-probabilities of policy and reference,
and trains on all of them. Both train the same model of this package on the same prompts with the same settings. The
tokens of a step are those that were sampled. By default the weights are random, so that almost all completions have
the maximum length; with ``model``, a run of sft_train, they end at different lengths.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, TrainerCallback

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.data.spelled_numbers import spelled_numbers
from hf_tfm.data.vocabulary import train_bytes
from hf_tfm.tasks.rlhf import RLHFArguments, RLHFTask
from hf_tfm.training.loop import train_step
from hf_tfm.training.optim import build_optimizer

from . import common

BETA = {"rloo": 0.05, "grpo": 0.04}


class Tokens:
    """A reward function, the number of letters "e", that counts the tokens it is given."""

    __name__ = "letters"
    count = 0

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        for ids in columns.get("completion_ids", ()):  # of trl
            self.count += len(ids)
        return [float(text.count("e")) for text in completions]


REWARD = Tokens()


def main(
    algorithms: tuple[str, ...] = ("rloo", "grpo"),
    model: str | None = None,
    layers: int = 4,
    hidden_size: int = 128,
    vocab_size: int = 512,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    num_generations: int = 8,
    steps: int = 3,
    rounds: int = 5,
    learning_rate: float = 1e-5,
) -> None:
    """Measure and write benchmarks/results/rlhf.json.

    Args:
        algorithms: rloo, grpo.
        model: folder of a causal language model with its tokenizer.
        layers, hidden_size, vocab_size: of the GPT with random weights that takes its place.
        max_new_tokens: maximum number of tokens of a completion.
        batch_size: completions of a step; num_generations: of them per prompt.
        steps: steps of each implementation in a round.
        rounds: timed rounds, after one warm-up round; medians are reported.
        learning_rate: of both.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = prompts(Path(folder))
        model = model or new_model(Path(folder), layers, hidden_size, vocab_size)
        for algorithm in algorithms:
            options = {
                "max_new_tokens": max_new_tokens,
                "batch_size": batch_size,
                "num_generations": num_generations,
                "learning_rate": learning_rate,
            }
            variants = {
                "ours": ours(algorithm, model, data, folder, steps, options),
                "trl": trl(algorithm, model, data, folder, steps, options),
            }
            found = measure(variants, rounds)
            rates = {name: [tokens / seconds for tokens, seconds in each] for name, each in found.items()}
            lengths = {
                name: round(statistics.mean(tokens for tokens, _ in each) / steps / batch_size, 1)
                for name, each in found.items()
            }
            time_ratio = 1 / common.ratio(rates, "ours", "trl")
            results[algorithm] = {
                "tokens_per_second": {name: round(statistics.median(each), 1) for name, each in rates.items()},
                "tokens_per_completion": lengths,
                "time_ratio": round(time_ratio, 3),
            }
            print(algorithm, results[algorithm], flush=True)
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "num_generations": num_generations}
    common.write("rlhf", {**settings, "rounds": rounds, "steps": steps, "results": results})


def measure(variants: dict[str, Callable[[], tuple[int, float]]], rounds: int) -> dict[str, list[tuple[int, float]]]:
    """Run all variants in turn; (tokens, seconds) of each round after a warm-up round."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name, work in variants.items():
            one = work()
            if number >= 0:
                found[name].append(one)
    return found


def prompts(folder: Path) -> Path:
    """A folder with the prompts of the built-in spelled numbers."""
    data = folder / "prompts"
    data.mkdir()
    for split, rows in spelled_numbers().items():
        lines = [json.dumps({"prompt": prompt}) for prompt in rows["prompt"]]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return data


def new_model(folder: Path, layers: int, hidden_size: int, vocab_size: int) -> str:
    """Folder of a GPT with random weights and a tokenizer of the prompts."""
    rows = spelled_numbers()["train"]
    tokenizer = train_bytes([a + b for a, b in zip(rows["prompt"], rows["completion"], strict=True)], vocab_size)
    torch.manual_seed(0)
    config = TfmGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    TfmGPTForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def ours(algorithm: str, model: str, data: Path, folder: str, steps: int, options: dict[str, Any]) -> Callable:
    """Function that runs steps of our recipe: its loader and its training step."""
    args = RLHFArguments(
        dataset_name=str(data),
        model_name_or_path=model,
        algorithm=algorithm,
        beta=BETA[algorithm],
        reward_functions=[f"{__name__}:REWARD"],
        output_dir=folder,
        max_steps=1,
        optimizer="adamw",
        **options,
    )
    accelerator = Accelerator()
    task = RLHFTask(args, accelerator)
    task.splits = task.load_splits()
    task.processor = task.build_processor()
    task.model = task.build_model()
    task.prepare()
    loader = task.dataloader("train", training=True)
    task.begin_training(loader)
    module, optimizer = accelerator.prepare(task.trained_module(), build_optimizer(task.trained_module(), args))

    def batches():
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    stream = batches()

    def work() -> tuple[int, float]:
        before, start = task.generated, time.perf_counter()
        for micro_batches in islice(stream, steps):
            train_step(accelerator, task, module, optimizer, micro_batches, args.max_grad_norm)
        return task.generated - before, time.perf_counter() - start

    return work


class Timer(TrainerCallback):
    """Seconds from the first step of a call of train to the end of its last."""

    start = seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step % args.max_steps == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds = time.perf_counter() - self.start


def trl(algorithm: str, model: str, data: Path, folder: str, steps: int, options: dict[str, Any]) -> Callable:
    """Function that runs steps of trl's trainer; its set-up and the start of its loop are not timed."""
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    kind, trainer_class = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[algorithm]
    config = kind(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=options["batch_size"],
        num_generations=options["num_generations"],
        max_completion_length=options["max_new_tokens"],
        learning_rate=options["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        beta=BETA[algorithm],
        disable_dropout=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"loss_type": "grpo"} if algorithm == "grpo" else {}),
    )
    rows = load_dataset("json", data_files=str(data / "train.jsonl"), split="train")
    timer = Timer()
    policy = TfmGPTForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = trainer_class(policy, REWARD, config, rows, processing_class=tokenizer, callbacks=[timer])

    def work() -> tuple[int, float]:
        before = REWARD.count
        trainer.train()
        return REWARD.count - before, timer.seconds

    return work
