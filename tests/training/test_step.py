"""An optimizer step does not depend on micro-batching, and a step with a non-finite gradient is skipped."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training_helpers import (
    FaultyTask,
    arguments,
    difference,
    fresh_accelerator,
    history,
    pairs,
    run_training,
    tiny_model,
)

from hf_tfm.models.cross_entropy import IGNORE_INDEX
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training import evaluate, train, train_step
from hf_tfm.training.checkpoint import full_weights, inner
from hf_tfm.training.optim import build_optimizer
from hf_tfm.training.session import LOOK_MICRO_BATCHES

ROWS = sorted(pairs(8), key=lambda row: len(row["labels"]))


def cuts(count):
    """``ROWS`` split into ``count`` micro-batches, the first with few tokens, the last with many."""
    size = len(ROWS) // count
    return [list(range(i * size, (i + 1) * size)) for i in range(count)]


def micro_batches(task, count):
    return [task.collator()([ROWS[i] for i in indices], indices, epoch=0) for indices in cuts(count)]


def step_once(count, steps=3, max_grad_norm=0.0, adam_epsilon=1e-4, **fields):
    """Weights after a few steps on the same rows in ``count`` micro-batches."""
    args = arguments(".", adam_epsilon=adam_epsilon)
    accelerator = fresh_accelerator(args)
    model = tiny_model(**fields)
    task = TranslationTask.for_model(model)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    for _ in range(steps):
        result = train_step(accelerator, task, prepared, optimizer, micro_batches(task, count), max_grad_norm)
    return full_weights(model), result


@pytest.mark.parametrize("fields", [{}, {"decoding": "mask_predict"}, {"norm_first": True, "label_smoothing": 0.0}])
@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_equal_one_batch(count, fields):
    one, whole = step_once(1, **fields)
    many, cut = step_once(count, **fields)
    assert difference(one, many) < 1e-6
    for term in whole.losses:
        assert cut.losses[term].item() == pytest.approx(whole.losses[term].item(), abs=1e-5)
        assert cut.counts[term] == whole.counts[term]
    assert cut.gradient_norm.item() == pytest.approx(whole.gradient_norm.item(), rel=1e-5)
    assert difference(full_weights(tiny_model(**fields)), one) > 1e-4  # the steps change the weights


def test_with_the_paper_epsilon_only_key_biases_differ():
    one, many = (step_once(count, adam_epsilon=1e-9)[0] for count in (1, 4))
    names = [name for name in one if not name.endswith("k_proj.bias")]
    assert len(one) - len(names) == 3
    assert difference({n: one[n] for n in names}, {n: many[n] for n in names}) < 1e-6


def test_averaging_micro_batch_means_gives_another_gradient():
    """The usual gradient accumulation, a mean of means, differs measurably here, so the test above can fail."""
    model = tiny_model()
    task = TranslationTask.for_model(model)
    assert len({task.count(batch)["token"] for batch in micro_batches(task, 2)}) == 2
    gradients = []
    for count in (1, 2):
        model.zero_grad()
        for batch in micro_batches(task, count):
            (task.losses(model, batch)["token"] / task.count(batch)["token"] / count).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert difference(*gradients) > 1e-3


def test_loss_equals_the_model_loss():
    model = tiny_model()
    task = TranslationTask.for_model(model)
    (batch,) = micro_batches(task, 1)
    _, result = step_once(1, steps=1)
    assert result.losses["token"].item() == pytest.approx(model(**batch).loss.item(), abs=1e-6)
    assert result.counts["token"] == sum(len(row["labels"]) for row in ROWS)


@pytest.mark.parametrize("decoding", ["autoregressive", "mask_predict"])
def test_dummy_batch_has_no_effect(decoding):
    model = tiny_model(decoding=decoding)
    task = TranslationTask.for_model(model)
    hidden = task.collator()(ROWS[:1], [0], epoch=0, is_dummy=True)
    assert set(task.count(hidden).values()) == {0}
    losses = task.losses(model, hidden)
    assert losses.keys() == task.count(hidden).keys()
    sum(losses.values()).backward()
    assert all(loss.item() == 0.0 for loss in losses.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())  # each rank is reduced


def test_reported_norm_is_before_clipping():
    free, result = step_once(1, steps=1)
    clipped, again = step_once(1, steps=1, max_grad_norm=0.01)
    assert again.gradient_norm.item() == pytest.approx(result.gradient_norm.item(), rel=1e-6)
    assert result.gradient_norm.item() > 0.01
    assert difference(free, clipped) > 0


def test_clipped_gradient_has_the_maximum_norm():
    """With plain SGD the length of the update is the learning rate times the clipped norm."""
    accelerator = fresh_accelerator()
    model = tiny_model()
    task = TranslationTask.for_model(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5, fused=True))
    result = train_step(accelerator, task, prepared, optimizer, micro_batches(task, 2), max_grad_norm=0.25)
    moved = torch.stack([(p.detach() - before[name]).norm() for name, p in model.named_parameters()]).norm()
    assert moved.item() == pytest.approx(0.5 * 0.25, rel=1e-4)
    assert result.gradient_norm.item() > 0.25


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_changes_nothing(kind, bad):
    args = arguments(".", optimizer=kind, weight_decay=0.1)
    accelerator = fresh_accelerator(args)
    model = tiny_model()
    task = FaultyTask.for_model(model)
    task.bad = {1: bad}
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    snapshots = []
    for _ in range(3):
        result = train_step(accelerator, task, prepared, optimizer, micro_batches(task, 1))
        moments = {f"{i}.{k}": v for i, own in enumerate(inner(optimizer).state.values()) for k, v in own.items()}
        snapshots.append(copy.deepcopy({**full_weights(model), **moments}))
        assert torch.isfinite(result.gradient_norm) == (len(snapshots) != 2)
    first, second, third = snapshots
    assert difference(first, second) == 0.0
    assert difference(second, third) > 0.0
    assert {float(value) for name, value in third.items() if name.endswith(".step")} == {2.0}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_run_counts_skipped_steps_and_continues(tmp_path, precision):
    options = {"logging_steps": 1, "mixed_precision": precision, "final_weights": "last"}
    result, model = run_training(arguments(tmp_path / "run", **options), bad={4: float("nan"), 7: float("inf")})
    rows = [row for row in history(tmp_path / "run") if "loss" in row]
    assert [row["skipped"] for row in rows] == [0] * 4 + [1] * 3 + [2] * 5
    assert (result.progress.step, result.progress.skipped) == (12, 2)
    assert all(torch.isfinite(weight).all() for weight in full_weights(model).values())
    assert [row["loss"] for row in rows if row["step"] in (5, 8)] == [0.0, 0.0]  # the skipped steps changed nothing
    _, clean = run_training(arguments(tmp_path / "clean", **options))
    assert result.progress.items < sum(len(row["labels"]) for row in pairs()) * 1.3
    assert difference(full_weights(model), full_weights(clean)) > 0


def test_too_many_consecutive_skips_end_the_run(tmp_path):
    bad = dict.fromkeys((3, 6, 7, 8, 9), float("nan"))
    args = arguments(tmp_path / "run", max_nonfinite_steps=3)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 9 \(max_nonfinite_steps=3\)"):
        run_training(args, bad=bad)
    result, _ = run_training(arguments(tmp_path / "other", max_nonfinite_steps=5), bad=bad)
    assert result.progress.skipped == 5


def test_skip_count_survives_a_restart(tmp_path):
    """Three skipped steps before the checkpoint and one after it count as four consecutive ones."""
    args = arguments(tmp_path / "run", max_nonfinite_steps=4, final_weights="last")
    run_training(args, bad=dict.fromkeys((2, 3, 4), float("nan")), events={4: "SIGTERM"})
    with pytest.raises(FloatingPointError, match="4 steps in a row, up to step 6"):
        run_training(args, bad={0: float("nan")})


def scaled_accelerator():
    """fp16 with a loss scaler, which accelerate creates only on accelerators, although torch supports both on a
    CPU.
    """
    fresh_accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", growth_interval=1000), True
    return accelerator


def test_loss_scaler_gives_the_same_steps(tmp_path):
    options = {"final_weights": "last", "max_grad_norm": 0.5, "logging_steps": 1}
    run_training(arguments(tmp_path / "plain", **options))
    result, _ = run_training(arguments(tmp_path / "scaled", **options), accelerator=scaled_accelerator())
    assert result.progress.skipped == 0
    for plain, scaled in zip(history(tmp_path / "plain"), history(tmp_path / "scaled"), strict=True):
        numbers = ("loss", "gradient_norm") if "loss" in plain else ("evaluation",)
        for name in numbers:
            assert scaled[name] == pytest.approx(plain[name], rel=0.01)


def test_loss_scaler_skips_lowers_its_scale_and_is_saved(tmp_path):
    args = arguments(tmp_path / "run", final_weights="last", max_nonfinite_steps=2)
    accelerator = scaled_accelerator()
    # Four in a row exceed max_nonfinite_steps, but the initial search for the loss scale is exempt.
    result, _ = run_training(
        args, bad=dict.fromkeys(range(4), float("inf")), events={8: "SIGTERM"}, accelerator=accelerator
    )
    assert (result.progress.skipped, result.stopped) == (4, True)
    assert accelerator.scaler.get_scale() == 2.0**12
    again = scaled_accelerator()
    run_training(args, accelerator=again)
    assert again.scaler.get_scale() == 2.0**12


def test_fp16_on_a_cpu_is_refused(tmp_path):
    if fresh_accelerator().device.type != "cpu":
        pytest.skip("there is an accelerator, on which fp16 works")
    with pytest.raises(ValueError, match='mixed_precision="fp16" needs an accelerator'):
        fresh_accelerator(arguments(tmp_path, mixed_precision="fp16"))


def test_optimizer_that_cannot_skip_is_refused():
    accelerator, model = fresh_accelerator(), tiny_model()
    task = TranslationTask.for_model(model)
    for fused in (None, False):
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=fused))
        with pytest.raises(ValueError, match="fused=True, got AdamW without"):
            train_step(accelerator, task, prepared, optimizer, micro_batches(task, 1))


def test_evaluation_is_the_mean_over_all_items():
    accelerator = fresh_accelerator()
    model = tiny_model(dropout=0.5).train()
    task = TranslationTask.for_model(model)

    class Pieces:
        def epoch(self, epoch):
            return iter([micro_batches(task, 4)[:1], micro_batches(task, 4)[1:]])

    values = evaluate(accelerator, task, model, Pieces())
    assert model.training
    model.eval()
    (batch,) = micro_batches(task, 1)
    assert values == {"loss": pytest.approx(model(**batch).loss.item(), abs=1e-5)}
    assert (batch["labels"] == IGNORE_INDEX).any()


def test_data_without_a_step_is_an_error(tmp_path):
    class Empty:
        def epoch(self, epoch, start=0):
            return iter(())

        def steps_per_epoch(self, epoch=0):
            return 0

    args, model = arguments(tmp_path / "run", warmup_steps=1), tiny_model()
    with pytest.raises(ValueError, match="gave no step"):
        train(
            fresh_accelerator(args),
            TranslationTask.for_model(model),
            model,
            Empty(),
            args,
            3,
            3,
            lambda _: {"loss": 0},
        )


def test_stop_request_is_checked_often_enough():
    """A cluster grants 30 seconds after SIGTERM; this many micro-batches take less."""
    assert LOOK_MICRO_BATCHES <= 10
