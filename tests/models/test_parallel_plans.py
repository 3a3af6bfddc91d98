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


def save_logits(folder: Path) -> None:
    """Code of every rank."""
    for name in TENSOR_PARALLEL:
        case = CASES[name]
        model = case.model_class.from_pretrained(folder / name, tp_plan="auto").eval()
        logits = model(**collate(case.rows())).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        if dist.get_rank() == 0:
            torch.save(logits.detach(), folder / f"{name}.pt")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in CASES:
        model = CASES[name].model().train()
        shard(model, mesh)
        torch.save(step(name, model), folder / f"fsdp{dist.get_rank()}_{name}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_the_same_as_one(tmp_path):
    """Tensor parallelism with transformers' own loading, and the loss and gradients of FSDP2, over gloo."""
    expected = {}
    for name in TENSOR_PARALLEL:
        model = CASES[name].model().eval()
        model.save_pretrained(tmp_path / name)
        expected[name] = model(**collate(CASES[name].rows())).logits
    run_ranks(save_logits, tmp_path)
    for name in CASES:
        alone = step(name, CASES[name].model().train())
        for rank in (0, 1):
            torch.testing.assert_close(torch.load(tmp_path / f"fsdp{rank}_{name}.pt"), alone, rtol=1e-5, atol=1e-5)
    for name, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits, rtol=1e-4, atol=1e-5)


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
