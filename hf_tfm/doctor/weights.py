"""Build the model to train, and check its weights: newly initialised ones, and frozen norms without statistics."""

import torch
from torch import Tensor, nn
from transformers import set_seed

from ..data.detection import class_names
from ..hub.pretrained import check_kind, load_to_train
from ..models.backbones import FrozenBatchNorm
from ..tasks.detectors import head_of, load_detector_to_train
from ..tasks.model_fields import build_new, label_fields, new_config
from .findings import Finding, failed, graded, ok, warning
from .splits import Case

LARGE_BACKBONE = 15_000_000  # parameters; larger backbones hardly train from scratch on a small data set
MOSTLY = 0.5


def add_model(case: Case) -> None:
    """Build the model of a case, without downloading backbone weights.

    Raises:
        ValueError, OSError: the arguments, or the weights of ``model_name_or_path``, do not fit.
    """
    args, fields = case.args, label_fields(class_names(case.train.rows))
    args.check_files()
    if source := args.model_name_or_path:
        args.check_saved(check_kind("model_name_or_path", source, args.accepted_models["model_name_or_path"]))
        case.earlier, case.missing = load_to_train(args.head, source, head_of)
        set_seed(args.seed)
        case.model = load_detector_to_train(args, fields)
    else:
        set_seed(args.seed)
        case.model = build_new(new_config(args.config_class, args, **fields), args.head)


def fresh_weights(case: Case) -> Finding:
    """Most weights are pretrained, or the model is small enough to train from scratch."""
    sizes = {name: parameter.numel() for name, parameter in case.model.named_parameters()}
    millions = f"{sum(sizes.values()) / 1e6:.1f} million weights"
    if case.earlier is None:
        of_backbone = [] if case.backbone is None else case.backbone.parameters()
        backbone = sum(parameter.numel() for parameter in of_backbone)
        if case.args.pretrained_backbone:
            return ok(
                f"{millions}, {backbone / 1e6:.1f} million of them in {origin(case)} pretrained backbone, the rest "
                "random"
            )
        message = f"all {millions} are randomly initialised, {backbone / 1e6:.1f} million of them in the backbone"
        if backbone <= LARGE_BACKBONE:
            return ok(message)
        limit = f"(limit: {LARGE_BACKBONE / 1e6:g} million)"
        return warning(f"{message} {limit}", "--pretrained_backbone true, or a smaller backbone")
    old, new = case.earlier.state_dict(), case.model.state_dict()
    kept = {name for name in old.keys() - case.missing if name in new and taken(old[name], new[name])}
    fresh = [name for name in sizes if name not in kept]
    share = sum(sizes[name] for name in fresh) / sum(sizes.values())
    if not fresh:
        return ok(f"all {millions} come from {case.args.model_name_or_path}")
    message = f"{share:.2%} of {millions} are randomly initialised: {', '.join(sorted({top(name) for name in fresh}))}"
    decided = {*case.model.classifier_modules, *case.model.query_modules}  # by the data and the arguments
    if not any(decided.isdisjoint(name.split(".")) for name in fresh):
        return ok(message)
    return graded(share > MOSTLY, message, "start from a detector, with the fields of its configuration")


def origin(case: Case) -> str:
    """Return the source of a pretrained backbone, in the possessive."""
    return f"{source}'s" if (source := case.args.backbone_source) else "timm's"


def taken(old: Tensor, new: Tensor) -> bool:
    """Return True if a weight equals the saved one, or its first rows if there are fewer queries."""
    return torch.equal(old[: len(new)] if new.ndim else old, new)


def top(name: str) -> str:
    """Return the module that a weight belongs to."""
    return ".".join(part for part in name.split(".")[:2] if part not in ("weight", "bias"))


def frozen_norms(case: Case) -> Finding:
    """Frozen norms have statistics of some data; without them they would stay identities."""
    norms = [module for module in case.model.modules() if isinstance(module, FrozenBatchNorm)]
    if not norms:
        return ok("no frozen norms")
    if case.args.pretrained_backbone:
        return ok(f"{len(norms)} frozen norms, with {origin(case)} statistics")
    idle = [norm for norm in norms if is_identity(norm)]
    if len(idle) < len(norms):
        return ok(f"{len(norms)} frozen norms with statistics")
    return failed(
        f"all {len(norms)} frozen norms have mean 0 and variance 1: the backbone is untrained",
        "--model.backbone_norm batch to train it from random weights, or another model_name_or_path",
    )


def is_identity(norm: nn.Module) -> bool:
    """Return True if the norm has its initial statistics."""
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())
