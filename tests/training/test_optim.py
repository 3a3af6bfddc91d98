"""Optimizers, schedules and weight averaging against their formulas; which weights a run saves."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import arguments, difference, fresh_accelerator, history, pairs, run_training, tiny_model

from hf_tfm import TfmViTConfig, TfmViTForImageClassification
from hf_tfm.tasks.base import Loader
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training import train
from hf_tfm.training.checkpoint import checkpoints, full_weights
from hf_tfm.training.optim import (
    average_weights,
    build_ema,
    build_optimizer,
    build_schedule,
    layer_id,
    parameter_groups,
)

WARMUP, STEPS, PEAK = 40, 200, 3e-3
TINY_VIT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}


def rates(schedule):
    """The learning rate of each step."""
    args = arguments(".", lr_scheduler_type=schedule, warmup_steps=WARMUP, max_steps=STEPS, learning_rate=PEAK)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), args)
    schedule = build_schedule(optimizer, args, STEPS)
    found = []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def closed_form(schedule, step):
    if step < WARMUP:
        return PEAK * step / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return {
        "inverse_sqrt": PEAK * math.sqrt(WARMUP / step),
        "cosine": PEAK * 0.5 * (1 + math.cos(math.pi * done)),
        "linear": PEAK * (1 - done),
        "constant": PEAK,
        "step": PEAK * (0.1 if step >= 133 else 1.0),
    }[schedule]


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "linear", "constant", "step"])
def test_schedule(schedule):
    assert rates(schedule) == pytest.approx([closed_form(schedule, step) for step in range(STEPS)], abs=1e-9)


def test_inverse_sqrt_matches_the_paper():
    """Equation 3: d^-0.5 * min(step^-0.5, step * warmup^-1.5); its peak is d^-0.5 * warmup^-0.5."""
    d = 512
    scale = PEAK / (d**-0.5 * WARMUP**-0.5)
    paper = [scale * d**-0.5 * min(step**-0.5, step * WARMUP**-1.5) for step in range(1, STEPS)]
    assert rates("inverse_sqrt")[1:] == pytest.approx(paper, rel=1e-6)


def test_rate_factors():
    model = TfmViTForImageClassification(TfmViTConfig(**TINY_VIT, image_size=16, patch_size=8))
    args = arguments(".", learning_rate=0.5, rate_factors={"embeddings": 0.1, "patch": 0.5})
    found = {p: group["lr"] for group in parameter_groups(model, args) for p in group["params"]}
    rates = {name: found[p] for name, p in model.named_parameters()}
    assert rates["vit.embeddings.cls_token"] == pytest.approx(0.05)
    assert rates["vit.embeddings.patch_embeddings.projection.weight"] == pytest.approx(0.025), "factors multiply"
    assert rates["classifier.weight"] == 0.5
    with pytest.raises(ValueError, match=r"rate_factors: no trained weight has backbone in its name"):
        parameter_groups(model, arguments(".", rate_factors={"backbone": 0.1}))
    with pytest.raises(ValueError, match=r"rate_factors must be above 0 and at most 1000, got 0.0 for classifier"):
        arguments(".", rate_factors={"classifier": 0.0})


def test_weight_decay_applies_to_matrices_only():
    model = tiny_model()
    model.model.encoder.layers[0].requires_grad_(False)
    decaying, free = parameter_groups(model, arguments(".", weight_decay=0.1))
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [{names[id(p)] for p in group["params"]} for group in (decaying, free)]
    assert all(name.endswith("bias") or "norm" in name for name in found[1])
    assert not any(name.endswith("bias") or "norm" in name for name in found[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found[0] | found[1] == trained
    assert not any("encoder.layers.0" in name for name in trained)


def test_positions_and_single_tokens_have_no_weight_decay():
    config = TfmViTConfig(image_size=8, patch_size=4, **TINY_VIT)
    model = TfmViTForImageClassification(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, arguments(".", weight_decay=0.1))
    free = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= free
    assert "vit.embeddings.patch_embeddings.projection.weight" not in free and "classifier.weight" not in free


def test_layer_wise_lr_decay():
    """Embeddings, 3 blocks and the head: learning rates d^4, d^3, d^2, d and 1 times the highest."""
    model = TfmViTForImageClassification(TfmViTConfig(image_size=8, patch_size=4, **TINY_VIT))
    args = arguments(".", layer_wise_lr_decay=0.5, learning_rate=1.6, weight_decay=0.1)
    optimizer = build_optimizer(model, args)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert len(rate) == len(found)
    expected = {
        "embeddings": 0.1,
        "layers.0": 0.2,
        "layers.1": 0.4,
        "layers.2": 0.8,
        "layernorm": 1.6,
        "classifier": 1.6,
    }
    for part, value in expected.items():
        own = {found[name] for name in found if f".{part}." in f".{name}"}
        assert list(own) == pytest.approx([value]), part
    schedule = build_schedule(optimizer, args, 100)
    optimizer.step()
    for _ in range(args.warmup_steps):
        schedule.step()
    assert max(schedule.get_last_lr()) == pytest.approx(1.6) and min(schedule.get_last_lr()) == pytest.approx(0.1)


def test_sgd_with_momentum_by_hand():
    weight = torch.nn.Parameter(torch.tensor([[2.0]]))
    model = torch.nn.Module()
    model.weight = weight
    optimizer = build_optimizer(model, arguments(".", optimizer="sgd", learning_rate=0.1, momentum=0.5))
    value, velocity = 2.0, 0.0
    for gradient in (3.0, -1.0, 2.0):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        velocity = 0.5 * velocity + gradient
        value -= 0.1 * velocity
        assert weight.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "options", [pytest.param({"optimizer": "sgd"}, marks=pytest.mark.slow), {"layer_wise_lr_decay": 0.7}]
)
def test_resumed_optimizer_is_bit_equal(tmp_path, options):
    """The state of other optimizers and of many parameter groups is restored completely."""
    _, whole = run_training(arguments(tmp_path / "whole", save_steps=4, learning_rate=0.01, **options))
    args = arguments(tmp_path / "part", save_steps=4, learning_rate=0.01, **options)
    run_training(args)
    for folder in checkpoints(tmp_path / "part")[1:]:
        shutil.rmtree(folder)
    _, again = run_training(args)
    assert difference(full_weights(whole), full_weights(again)) == 0.0


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_optimizer_type(kind):
    """One step from zero moments: Adam moves by the learning rate against the gradient's sign, AdamW also decays."""
    weight = torch.nn.Parameter(torch.tensor([[2.0]]))
    model = torch.nn.Module()
    model.weight = weight
    args = arguments(".", optimizer=kind, learning_rate=0.1, weight_decay=0.5, adam_epsilon=1e-12)
    optimizer = build_optimizer(model, args)
    weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    decayed = 2.0 * (1 - 0.1 * 0.5) if kind == "adamw" else 2.0
    assert weight.item() == pytest.approx(decayed - 0.1, abs=1e-6)
    assert optimizer.defaults["betas"] == (0.9, 0.98)


def test_ema_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = build_ema(model, 0.9)
    expected = None
    for value in (1.0, 2.0, 5.0, -3.0):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update_parameters(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
        assert ema.module.weight.item() == pytest.approx(expected, abs=1e-6)


def test_average_is_the_mean(tmp_path):
    run_training(arguments(tmp_path / "run", save_steps=2, save_total_limit=4))
    folders = checkpoints(tmp_path / "run")[-3:]
    stacks = [load_file(folder / "model.safetensors") for folder in folders]
    mean = {name: torch.stack([weights[name] for weights in stacks]).mean(dim=0) for name in stacks[0]}
    assert difference(average_weights(folders), mean) < 1e-6
    assert difference(average_weights(folders), stacks[-1]) > 1e-4
    with pytest.raises(ValueError, match="no checkpoints"):
        average_weights([])


def finished_run(folder, **options):
    """A run that saves every 2 steps and evaluates every 4; returns its progress and final weights."""
    args = arguments(folder, save_steps=2, eval_steps=4, learning_rate=0.03, **options)
    result, model = run_training(args)
    return result.progress, full_weights(model)


def weights_of(folder, step, name="model"):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def test_last_weights(tmp_path):
    _, shipped = finished_run(tmp_path / "run", final_weights="last")
    assert difference(shipped, weights_of(tmp_path / "run", 12)) == 0.0


def test_averaged_weights(tmp_path):
    _, shipped = finished_run(tmp_path / "run", final_weights="average", average_checkpoints=3)
    stacks = [weights_of(tmp_path / "run", step) for step in (8, 10, 12)]
    mean = {name: torch.stack([weights[name] for weights in stacks]).mean(dim=0) for name in shipped}
    assert difference(shipped, mean) < 1e-6


@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_ema_weights_are_saved_and_evaluated(tmp_path, precision):
    folder, options = tmp_path / "run", {"ema_decay": 0.9, "mixed_precision": precision}
    _, shipped = finished_run(folder, final_weights="ema", **options)
    assert difference(shipped, weights_of(folder, 12, "ema")) == 0.0
    assert difference(shipped, weights_of(folder, 12)) > 1e-3
    finished_run(tmp_path / "last", final_weights="last", **options)
    scores = [
        [row["evaluation"]["loss"] for row in history(path) if "evaluation" in row]
        for path in (folder, tmp_path / "last")
    ]
    assert all(one != two for one, two in zip(*scores, strict=True))


def run_with_scores(folder, scores, **options):
    """A run whose evaluation scores are given; returns its progress and final weights."""
    short = {"warmup_steps": min(4, len(scores)), "eval_steps": 1, "logging_steps": 100, "learning_rate": 0.03}
    args = arguments(folder, max_steps=len(scores), **{**short, **options})
    accelerator, model = fresh_accelerator(args), tiny_model()
    task, values = TranslationTask.for_model(model), iter(scores)
    rows = pairs(3)

    class Same(Loader):
        def epoch(self, epoch, start=0):
            while True:
                yield [task.collator()(rows, [0, 1, 2], epoch)]

        def steps_per_epoch(self, epoch=0):
            return None

    def score(_):
        return {"loss": 1.0, args.metric_for_best_model: next(values)}

    result = train(accelerator, task, model, Same(), args, args.max_steps, args.eval_steps, score)
    return result.progress, full_weights(model)


def test_best_weights_by_loss_are_kept_and_saved(tmp_path):
    progress, shipped = run_with_scores(tmp_path / "run", [5.0, 3.0, 4.0, 4.0, 3.0, 3.5])
    assert (progress.best, progress.best_step, progress.step) == (3.0, 2, 6)  # ties do not replace the best
    assert difference(shipped, weights_of(tmp_path / "run", 2)) == 0.0
    assert [int(path.name[5:]) for path in checkpoints(tmp_path / "run")] == [2, 5, 6]


def test_best_weights_by_a_score_are_the_highest(tmp_path):
    progress, shipped = run_with_scores(tmp_path / "run", [5.0, 3.0, 9.0, 4.0, 8.0, 3.5], metric_for_best_model="bleu")
    assert (progress.best, progress.best_step) == (9.0, 3)
    assert difference(shipped, weights_of(tmp_path / "run", 3)) == 0.0


def test_early_stopping_patience_ends_the_run(tmp_path):
    scores = [5.0, 3.0, 4.0, 2.9, 4.0, 3.5, 3.0, 1.0]
    progress, shipped = run_with_scores(tmp_path / "run", scores, early_stopping_patience=3)
    assert (progress.step, progress.best_step, progress.waited) == (7, 4, 3)
    assert difference(shipped, weights_of(tmp_path / "run", 4)) == 0.0
    progress, _ = run_with_scores(tmp_path / "patient", scores, early_stopping_patience=0)
    assert (progress.step, progress.best_step) == (8, 8)


def test_higher_early_stopping_patience_continues(tmp_path):
    run_with_scores(tmp_path / "run", [3.0, 4.0, 4.0, 4.0, 4.0, 4.0], early_stopping_patience=2)
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000003"
    progress, _ = run_with_scores(tmp_path / "run", [4.0, 2.0, 4.0, 4.0, 4.0, 4.0], early_stopping_patience=4)
    assert (progress.step, progress.best_step) == (6, 5)


def test_nan_evaluations(tmp_path, capsys):
    nan = float("nan")
    progress, _ = run_with_scores(tmp_path / "some", [nan, 4.0, nan, 5.0])
    assert (progress.best, progress.best_step) == (4.0, 2)
    progress, shipped = run_with_scores(tmp_path / "none", [nan] * 3, metric_for_best_model="bleu")
    assert (progress.best, progress.best_step) == (None, None)
    assert difference(shipped, weights_of(tmp_path / "none", 3)) == 0.0
    assert "the last weights are taken" in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match="the validation loss is nan after the last of 3 steps"):
        run_with_scores(tmp_path / "loss", [nan] * 3)


def test_unknown_metric_for_best_model(tmp_path):
    with pytest.raises(ValueError, match='metric_for_best_model "bleu" is not evaluated; available: loss'):
        run_training(arguments(tmp_path / "run", metric_for_best_model="bleu"))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"save_total_limit": 1}, [12]),
        ({"save_total_limit": 3}, [8, 10, 12]),
        ({"save_total_limit": 1, "average_checkpoints": 4}, [6, 8, 10, 12]),
    ],
)
def test_checkpoint_rotation(tmp_path, options, kept):
    progress, _ = finished_run(tmp_path / "run", **options)
    steps = {int(path.name[5:]) for path in checkpoints(tmp_path / "run")}
    assert steps == {*kept, progress.best_step}
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == len(steps)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    found = []
    for enabled in (False, True):
        args = arguments(tmp_path / str(enabled), gradient_checkpointing=enabled)
        _, model = run_training(args, tiny_model(dropout=0.2))
        assert model.is_gradient_checkpointing is enabled
        found.append(full_weights(model))
    assert difference(*found) < 1e-6


@pytest.mark.slow
def test_compiled_model_gives_the_same_weights(tmp_path):
    found = [
        full_weights(run_training(arguments(tmp_path / str(enabled), torch_compile=enabled))[1])
        for enabled in (False, True)
    ]
    assert difference(*found) < 1e-5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert.layers.2.self_attn.q_proj.weight", 3),
        ("bert.encoder.layer.0.output.dense.bias", 1),
        ("transformer.h.11.attn.c_attn.weight", 12),
        ("transformer.wte.weight", 0),
        ("transformer.wpe.weight", 0),
        ("model.shared.weight", 0),
        ("vit.embeddings.cls_token", 0),
        ("vit.distillation_token", 0),
        ("classifier.weight", math.inf),
        ("backbone.layer1.0.conv1.weight", math.inf),
        ("bbox_predictor.layers.0.weight", math.inf),
        ("model.decoder.bbox_embed.1.layers.2.bias", math.inf),
    ],
)
def test_layer_ids_of_our_parameter_names_and_transformers_names(name, expected):
    assert layer_id(name) == expected
