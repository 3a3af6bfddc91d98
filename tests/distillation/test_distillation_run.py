"""Complete runs: the wrapped student can be averaged, stopped, resumed and saved like any other model."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from distillation_helpers import bert, distillation, language_task, sentences, training_samples

from hf_tfm import TfmBertForMaskedLM
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.distillation.cache import CachedTeacher, CacheFormat, write_cache
from hf_tfm.distillation.resolve import signals_of
from hf_tfm.tasks.distillation import DistillationTask
from hf_tfm.training import TrainingArguments, evaluate, train

TERMS = [
    {"kind": "label"},
    {"kind": "soft_target", "temperature": 2.0},
    {"kind": "hidden_state"},
    {"kind": "attention_score"},
]
OPTIONS = {
    "max_steps": 8,
    "warmup_steps": 2,
    "logging_steps": 2,
    "save_steps": 2,
    "learning_rate": 3e-3,
    "final_weights": "last",
}


class Cut(Exception):
    """Raised to interrupt a run."""


class CuttingLoader:
    """A loader that interrupts the run before a given step."""

    def __init__(self, loader, last):
        self.loader, self.last, self.done = loader, last, 0
        self.steps_per_epoch = loader.steps_per_epoch

    def epoch(self, epoch, start=0):
        for step in self.loader.epoch(epoch, start):
            if self.done == self.last:
                raise Cut
            self.done += 1
            yield step


def run(folder, last=None, cache=None, **overrides):
    """Distil for 8 steps or until interrupted; returns task, model and the student's validation scores."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    plain = language_task()
    # Dropout in the student: a resumed run must draw the same masks.
    student = bert(2, 16, seed=1, hidden_dropout_prob=0.1)
    task, model = distillation(plain, bert(4), student, TERMS)
    rows = sentences(12)
    if cache is not None:
        names = signals_of(task.terms, "teacher")
        write_cache(task.source, training_samples(task, rows), cache, CacheFormat(names, 2, dtype="fp32"))
        task = DistillationTask.around(plain, CachedTeacher(cache), task.terms)
    args = TrainingArguments(output_dir=str(folder), progress=False, **{**OPTIONS, **overrides})
    learning = StepLoader(
        rows, BatchSampler(12, 4, seed=0), task.collator(), 2, num_workers=args.dataloader_num_workers
    )
    held_out = StepLoader(sentences(6, seed=1), BatchSampler(6, 6, shuffle=False), plain.collator())

    def score(trained):
        return evaluate(accelerator, plain, trained.student, held_out)

    loader = learning if last is None else CuttingLoader(learning, last)
    result = train(accelerator, task, model, loader, args, args.max_steps, 2, score)
    assert not result.stopped and result.progress.step == args.max_steps
    return model, score(model)


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resumed_run_equals_uninterrupted_run(tmp_path, cached):
    options = {"cache": tmp_path / "cache", "dataloader_num_workers": 1} if cached else {}
    whole, _ = run(tmp_path / "whole", **options)
    with pytest.raises(Cut):
        run(tmp_path / "cut", last=5, **options)
    resumed, _ = run(tmp_path / "cut", **options)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "overrides",
    [
        {"ema_decay": 0.5, "final_weights": "ema"},
        pytest.param({"final_weights": "best"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_only_the_student_is_saved(tmp_path, overrides):
    model, scores = run(tmp_path / "run", **overrides)
    model.student.save_pretrained(tmp_path / "student")
    loaded, report = TfmBertForMaskedLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again = evaluate(
        Accelerator(cpu=True),
        language_task(),
        loaded,
        StepLoader(sentences(6, seed=1), BatchSampler(6, 6, shuffle=False), language_task().collator()),
    )
    assert again == scores


def test_cached_run_equals_online_run(tmp_path):
    online, _ = run(tmp_path / "online")
    cached, _ = run(tmp_path / "run", cache=tmp_path / "cache")  # 8 steps are 2 2/3 epochs; two epochs are cached
    ours, theirs = online.state_dict(), cached.state_dict()
    difference = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert difference > 1e-4  # the third epoch reuses the masks of the first
    early, _ = run(tmp_path / "early", max_steps=6)
    other, _ = run(tmp_path / "other", max_steps=6, cache=tmp_path / "cache")
    ours, theirs = early.state_dict(), other.state_dict()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
