"""Linear probing: batch-norm statistics independent of micro-batching, folding of the head, a frozen encoder."""

import copy

import pytest
import torch
from image_tasks import classification, examples, tiny_vit, training_loader
from torch import nn

from hf_tfm.data.images import WatchedLoader
from hf_tfm.tasks.linear_probe import ProbeHead, fold_probe, measure_features, prepare_probe
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.optim import build_optimizer


def loader_of(task, micro=None, bad=()):
    return WatchedLoader(training_loader(task, examples(12, bad=bad), micro=micro), max_bad_images=12)


def head() -> ProbeHead:
    torch.manual_seed(0)
    return ProbeHead(nn.Linear(6, 3), mean=torch.randn(6), variance=torch.rand(6) + 0.1)


def test_folded_head_gives_the_same_output():
    probe = head()
    features = 3.0 * torch.randn(50, 6) + 1.0
    folded = probe.fold()
    assert type(folded) is nn.Linear
    assert (folded(features) - probe(features)).abs().max() < 1e-5
    assert (folded(features) - probe.linear(features)).abs().max() > 0.1  # the norm has an effect


def test_head_equals_batch_norm_with_fixed_statistics():
    probe, features = head(), torch.randn(50, 6)
    scaled = (features - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
    assert torch.allclose(probe(features), probe.linear(scaled), atol=1e-5)


def test_training_does_not_change_the_statistics():
    probe = head().train()
    before = copy.deepcopy(probe.norm.state_dict())
    whole = probe(features := torch.randn(8, 6))
    assert torch.allclose(whole, torch.cat([probe(features[:1]), probe(features[1:])]), atol=1e-6)
    assert probe.training and all(torch.equal(before[name], value) for name, value in probe.norm.state_dict().items())


TOKENS = pytest.mark.parametrize("token", [False, True])  # with a distillation token and its head


@TOKENS
@pytest.mark.parametrize("bad", [(), (4, 9)])
def test_statistics_are_those_of_all_features(accelerator, bad, token):
    """Features of images as augmented and mixed in training; unreadable images are skipped."""
    task, model = classification(), tiny_vit(distillation_token=token).eval()
    task.accelerator = accelerator
    found = measure_features(task, model, loader_of(task, bad=bad), max_steps=2)
    with torch.no_grad():
        batches = [batch for step in loader_of(task, bad=bad).epoch(0) for batch in step]
        states = torch.cat([model.vit(**task.inputs(batch)).last_hidden_state for batch in batches]).double()
    assert len(states) == 12 - len(bad)
    assert list(found) == ["classifier", "distillation_classifier"][: 1 + token]
    for column, (mean, variance) in enumerate(found.values()):
        features = states[:, column]
        assert torch.allclose(mean, features.mean(dim=0), atol=1e-6)
        assert torch.allclose(variance, features.var(dim=0, unbiased=False), atol=1e-6)


def test_statistics_do_not_depend_on_micro_batches(accelerator):
    task, model = classification(), tiny_vit().eval()
    task.accelerator = accelerator
    one = measure_features(task, model, loader_of(task), 2)["classifier"]
    other = measure_features(task, model, loader_of(task, micro=2), 2)["classifier"]
    assert type(model.classifier) is nn.Linear and not model.classifier._forward_pre_hooks
    for mine, theirs in zip(one, other, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_number_of_steps_is_respected(accelerator):
    task, model = classification(), tiny_vit().eval()
    task.accelerator = accelerator
    (first, _), (both, _) = (measure_features(task, model, loader_of(task), steps)["classifier"] for steps in (1, 2))
    assert (first - both).abs().max() > 1e-4


def test_no_readable_image_is_an_error(accelerator):
    task = classification()
    task.accelerator = accelerator
    with pytest.raises(ValueError, match="no training image can be read"):
        measure_features(task, tiny_vit(), loader_of(task, bad=range(12)), 2)


@TOKENS
@pytest.mark.parametrize("micro", [None, 2])
def test_only_the_linear_layers_are_trained(accelerator, micro, token):
    task, model = classification(), tiny_vit(distillation_token=token)
    task.accelerator = accelerator
    task.args.batch_size = 6
    prepare_probe(task, model, loader_of(task))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(output_dir=".", max_steps=2, learning_rate=0.1, optimizer="sgd", warmup_steps=0)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    prepared.train()
    for step in loader_of(task, micro=micro).epoch(0):
        train_step(accelerator, task, prepared, optimizer, step)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    heads = ["classifier", "distillation_classifier"][: 1 + token]
    assert moved == {f"{head}.linear.{kind}" for head in heads for kind in ("weight", "bias")}
    batch = next(loader_of(task).epoch(0))[0]
    expected = model.eval()(**task.inputs(batch)).logits
    fold_probe(model)
    assert all(type(getattr(model, head)) is nn.Linear for head in heads)
    assert torch.allclose(model(**task.inputs(batch)).logits, expected, atol=1e-4)


def test_micro_batches_equal_one_batch(accelerator):
    results = []
    for micro in (None, 2):
        task, model = classification(), tiny_vit()
        task.accelerator = accelerator
        task.args.batch_size = 6
        prepare_probe(task, model, loader_of(task, micro=micro))
        args = TrainingArguments(output_dir=".", max_steps=2, learning_rate=0.1, optimizer="sgd", warmup_steps=0)
        optimizer = build_optimizer(model, args)
        for step in loader_of(task, micro=micro).epoch(0):
            train_step(accelerator, task, model.train(), optimizer, step)
        results.append(model.classifier.fold().weight.detach())
    assert (results[0] - results[1]).abs().max() < 1e-6
