"""Fully sharded data parallel (FSDP2): each rank holds a part of every weight, gradient and optimizer state.

model -> units, each gathered while it computes -> sharded model; for evaluation and at the end a plain model again

`torch.distributed.fsdp.fully_shard` shards the modules in place. Accelerate's own preparation is not used, because it
shards input and output embeddings as units of their own, which fails for tied weights and for models without an
embedding; its configuration (mesh, units, mixed precision, offload) is. Weights that are sharded are DTensors.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
FSDP_PACKAGE = "torch.distributed.fsdp"


def is_sharded(model: nn.Module) -> bool:
    """Return True if FSDP2 shards a module of the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def full_tensor(value: Tensor) -> Tensor:
    """Return the whole tensor on every rank; all ranks must call it if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def check_sharding(accelerator: Accelerator, fsdp: bool) -> None:
    """Refuse a configuration of accelerate, or a launcher, that cannot shard.

    Raises:
        ValueError: FSDP of version 1, or ``fsdp`` without a process group.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2 in the configuration of accelerate, got {plugin.fsdp_version}: the first version "
            "of FSDP is not supported"
        )
    if fsdp and not distributed.is_initialized():
        raise ValueError("fsdp=true needs several processes, got 1: start them with torch.distributed.run")


def sharding_options(accelerator: Accelerator, fsdp: bool) -> dict[str, Any] | None:
    """Return the arguments of `shard`, or None if neither ``fsdp`` nor the configuration of accelerate asks for it."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and not fsdp:
        return None
    mesh, config = accelerator.torch_device_mesh, accelerator.parallelism_config
    if plugin is not None and mesh is not None and config is not None:
        mesh = mesh[tuple(config.fsdp_dim_names)]
    else:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=("fsdp",))
    if plugin is None:
        return {"mesh": mesh}
    options = {
        "units": plugin.transformer_cls_names_to_wrap,
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy,
        "offload_policy": plugin.cpu_offload,
    }
    return {"mesh": mesh, **{name: value for name, value in options.items() if value is not None}}


def prepare_sharded(accelerator: Accelerator, model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Move a model to the device of this rank, apply mixed precision, and shard it in place.

    Takes the place of ``accelerator.prepare(model)``. The weights of the main process become those of all: with
    ``fsdp_cpu_ram_efficient_loading`` of accelerate, only the main process has loaded them.

    Args:
        options: see `sharding_options`.
    """
    model = accelerator.prepare_model(model, evaluation_mode=True)  # autocast, but no DistributedDataParallel
    weights = model.state_dict()
    shard(model, **options)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights if accelerator.is_main_process else {}, options=broadcast)
    return model


def shard(model: nn.Module, mesh: DeviceMesh, units: list[str] | None = None, **options: Any) -> None:
    """Shard a model in place, each unit by itself and the rest with the root.

    Args:
        units: names of the classes whose modules are gathered one by one; default, the modules in the ``fsdp_plan``.
            A module that shares a weight with one outside of it is no unit.
        options: of `torch.distributed.fsdp.fully_shard`.
    """
    for module in unit_modules(model, units):
        fully_shard(module, mesh=mesh, **options)
    options.pop("reshard_after_forward", None)  # the root's weights are needed again at once
    fully_shard(model, mesh=mesh, **options)


def unit_modules(model: nn.Module, names: list[str] | None = None) -> list[nn.Module]:
    """List the modules that `shard` gathers one by one, inner ones first.

    Args:
        names: see `shard`.
    """
    chosen = [module for module in model.modules() if module is not model and type(module).__name__ in (names or ())]
    if names is None:
        chosen = planned_modules(model)
    owners = holders(model)
    units = [module for module in chosen if all(count == owners[weight] for weight, count in holders(module).items())]
    return [module for module in units if any(True for _ in module.parameters())][::-1]


def planned_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules in the ``fsdp_plan`` of a model, or of the models it holds; outer ones first."""
    plan = getattr(model, "fsdp_plan", None)
    if not isinstance(model, PreTrainedModel) or not plan:
        return [module for child in model.children() for module in planned_modules(child)]
    patterns = [re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in plan]
    return [module for name, module in model.named_modules() if any(pattern.fullmatch(name) for pattern in patterns)]


def holders(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each weight, by its id."""
    weights = [weight for module in model.modules() for weight in module._parameters.values()]
    return Counter(id(weight) for weight in weights if weight is not None)


@contextmanager
def unsharded(model: nn.Module, source: nn.Module | None = None) -> Iterator[nn.Module]:
    """Make a sharded model a plain one with full weights while the context lasts; all ranks must enter it.

    Inside, ranks may compute different numbers of batches, call any of the modules, and generate; nothing is
    communicated. The weights must fit on the device of each rank.

    Args:
        source: model with the same modules whose weights are taken, for instance their average.

    Yields:
        The model to use: ``model`` if it is sharded, else ``source`` if given.
    """
    if not is_sharded(model):
        yield model if source is None else source
        return
    restore = unshard(model, source)
    try:
        yield model
    finally:
        restore()


def unshard(model: nn.Module, source: nn.Module | None = None) -> Callable[[], None]:
    """Make a sharded model a plain one with full weights; all ranks must call it.

    Its classes, weights and hooks become those of a model that was never sharded, because the sharded ones write
    other files (``save_pretrained`` looks for the code of the class), and communicate when they compute.

    Args:
        source: see `unsharded`.

    Returns:
        A function that makes the model a sharded one again.
    """
    undo: list[Callable[[], None]] = []
    weights = dict((source or model).named_parameters(remove_duplicate=False))
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for prefix, module in model.named_modules():
        for name, weight in list(module._parameters.items()):
            if isinstance(weight, DTensor):
                if id(weight) not in plain:
                    value = full_tensor(weights[f"{prefix}.{name}" if prefix else name].detach())
                    plain[id(weight)] = nn.Parameter(value, weight.requires_grad)
                setattr(module, name, plain[id(weight)])  # recurrent layers have other references, which they update
                undo.append(partial(setattr, module, name, weight))
        for name in HOOKS:
            hooks = getattr(module, name)
            kept = {key: hook for key, hook in hooks.items() if not _is_of_fsdp(hook)}
            if len(kept) < len(hooks):
                undo.append(_refill(hooks, kept))
        if isinstance(module, FSDPModule):
            undo.append(_change_class(module))

    def restore() -> None:
        for step in reversed(undo):
            step()

    return restore


def _refill(hooks: dict[int, Any], kept: dict[int, Any]) -> Callable[[], None]:
    old = dict(hooks)

    def fill(content: dict[int, Any]) -> None:
        hooks.clear()
        hooks.update(content)

    fill(kept)
    return partial(fill, old)


def _change_class(module: nn.Module) -> Callable[[], None]:
    sharded = type(module)
    module.__class__ = next(kind for kind in sharded.__mro__ if not issubclass(kind, FSDPModule))
    return partial(setattr, module, "__class__", sharded)


def _is_of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # torch wraps hooks of state dictionaries
    function = getattr(function, "func", function)
    return str(getattr(function, "__module__", "")).startswith(FSDP_PACKAGE)
