"""Tensor-parallel and FSDP plans name existing modules, in every family and with every head."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from head_cases import CASES, collate
from processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import hf_tfm
from hf_tfm.sharding import full_tensor, shard

MORE = ("swin", "video_transformer", "long_range", "rnn_seq2seq", "faster_rcnn", "convlstm")
MODELS = ("masked", "causal", "vit", "autoencoder", "seq2seq", "detection", "panoptic", "deformable_detr")
TENSOR_PARALLEL = (*MODELS, "swin", "long_range")


def names(pattern: str, modules: set[str]) -> set[str]:
    """Modules that match a pattern, in which "*" stands for a number."""
    parts = pattern.split(".")
    return {
        name
        for name in modules
        if len(name.split(".")) == len(parts)
        and all(part in ("*", own) for part, own in zip(parts, name.split("."), strict=True))
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_pattern_matches_and_every_block_is_planned(name):
    model = CASES[name].model()
    modules = {path for path, _ in model.named_modules()}
    for plan in (model.tp_plan, model.fsdp_plan):
        assert plan and all(names(pattern, modules) for pattern in plan), plan
    planned = set().union(*(names(pattern, modules) for pattern in model.tp_plan))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {path for path in linear if "layers." in path and path.split("layers.")[1][0].isdigit()}
    blocks = {path for path in inside if ".self_attn." in path or ".cross_attn." in path or ".feed_forward." in path}
    assert blocks and blocks <= planned
    sharded = set().union(*(names(pattern, modules) for pattern in model.fsdp_plan))
    assert {path for path in sharded if not path.endswith(".backbone")} == {path.rsplit(".", 2)[0] for path in blocks}


@pytest.mark.parametrize("name", MORE)
def test_every_pattern_matches(name):
    """Families whose blocks have other names."""
    model = CASES[name].model()
    modules = {path for path, _ in model.named_modules()}
    assert model.fsdp_plan
    assert all(names(pattern, modules) for pattern in (*model.tp_plan, *model.fsdp_plan))


def step(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Loss and gradients of a step."""
    torch.manual_seed(2)  # anchors are sampled
    loss = model(**collate(CASES[name].rows())).loss
    loss.backward()
    gradients = {key: full_tensor(p.grad) for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def save_steps(folder: Path) -> None:
    """Code of every rank."""
    for name in TENSOR_PARALLEL:
        model = CASES[name].model_class.from_pretrained(folder / name, tp_plan="auto").eval()
        result = step(name, model)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in CASES:
        model = CASES[name].model().train()
        shard(model, mesh)
        torch.save(step(name, model), folder / f"fsdp{dist.get_rank()}_{name}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_the_same_as_one(tmp_path):
    """Loss and gradients with tensor parallelism by transformers' own loading, and with FSDP2, over gloo."""
    expected = {}
    for name in TENSOR_PARALLEL:
        model = CASES[name].model().eval()
        model.save_pretrained(tmp_path / name)
        expected[name] = step(name, model)
    run_ranks(save_steps, tmp_path)
    for name in CASES:
        alone = step(name, CASES[name].model().train())
        for rank in (0, 1):
            torch.testing.assert_close(torch.load(tmp_path / f"fsdp{rank}_{name}.pt"), alone, rtol=1e-5, atol=1e-5)
    for name, alone in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), alone, rtol=1e-4, atol=1e-5)


def train(name: str, model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps of Adam, and the weights after them."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, eps=1e-4, foreach=False)
    losses = []
    for number in range(3):
        torch.manual_seed(number)  # anchors are sampled
        loss = model(**collate(CASES[name].rows())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(full_tensor(loss.detach()).item())
    return losses, {key: full_tensor(weight.detach()) for key, weight in model.state_dict().items()}


def save_trained(folder: Path, names: list[str]) -> None:
    """Code of every rank."""
    for name in names:
        model = CASES[name].model_class.from_pretrained(folder / name, tp_plan="auto").eval()
        result = train(name, model)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory):
    """{name: losses and weights} of one process and of two, for the models that have a plan."""
    folder, alone = tmp_path_factory.mktemp("tensor_parallel"), {}
    for name, case in CASES.items():
        model = case.model().eval()
        if model.tp_plan:
            model.save_pretrained(folder / name)
            alone[name] = train(name, model)
    run_ranks(save_trained, folder, list(alone), timeout=900)
    return alone, {name: torch.load(folder / f"{name}.pt") for name in alone}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_with_tensor_parallelism_equals_that_of_one_process(name, tensor_parallel, equality):
    if name not in tensor_parallel[0]:
        pytest.skip("the model has no plan")
    (losses, weights), (split_losses, split_weights) = (runs[name] for runs in tensor_parallel)
    assert weights.keys() == split_weights.keys()
    kept = [key for key in weights if not key.endswith("k_proj.bias")]  # their gradient is rounding alone
    largest = max((weights[key] - split_weights[key]).abs().max().item() for key in kept)
    of_losses = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(losses, split_losses, strict=True))
    equality(f"{CASES[name].model_class.__name__} ({name})", "TP", weights=largest, losses=of_losses)
    assert losses[2] != losses[0]
    assert largest < (1e-3 if name == "deformable_detr" else 1e-5)  # rounding, which Adam enlarges
    assert of_losses < 1e-6


def trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_backbone_can_be_frozen_and_unfrozen(norm):
    """As in transformers' DetrModel."""
    detector = hf_tfm.TfmDetrForObjectDetection(
        hf_tfm.TfmDetrConfig(**{**CASES["detection"].fields, "backbone_norm": norm})
    ).train()
    backbone, batch = detector.model.backbone, collate(CASES["detection"].rows())
    detector.model.freeze_backbone()
    before = copy.deepcopy(backbone.state_dict())
    detector.train()(**batch).loss.backward()
    assert not trainable(backbone) and trainable(detector.model.input_projection)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert detector.model.input_projection.weight.grad.abs().max() > 0
    detector.model.unfreeze_backbone()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    detector(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
