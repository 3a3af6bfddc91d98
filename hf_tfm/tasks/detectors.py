"""A detector to train: new, or from a pretrained one that may have other classes or another number of queries.

The class of a detector says what depends on the data: ``classifier_modules``, ``query_modules`` and ``head_modules``,
names of modules, see `TfmDetrPreTrainedModel`; and ``image_processor_name``.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..hub.loading import load_config
from ..hub.pretrained import load_to_train
from ..models.backbones import TimmFeatures
from .model_fields import build_new, fresh_head, new_config
from .scenes import SceneArguments

log = logging.getLogger(__name__)

BATCH_COUNTS = "num_batches_tracked"


def model_class(args: SceneArguments) -> type[Any]:
    """Return the class of the model to train."""
    if source := args.model_name_or_path:
        model_type = load_config(source, "model_name_or_path", trust_remote_code=None).model_type
    else:
        model_type = args.config_class.model_type
    return args.head.model_class(model_type)


def build_detector(args: SceneArguments, fields: dict[str, Any]) -> PreTrainedModel:
    """Return the model to train, with random weights or those of ``model_name_or_path``.

    Args:
        fields: of the configuration, decided by the data.
    """
    if args.model_name_or_path:
        return load_detector_to_train(args, fields)
    model = build_new(new_config(args.config_class, args, **fields), args.head)
    if args.pretrained_backbone:
        next(module for module in model.modules() if isinstance(module, TimmFeatures)).load_pretrained()
    return model


def head_of(model: PreTrainedModel, name: str) -> str:
    """Return the head of a weight, for `load_to_train`.

    The batch counts of norms are among the heads: frozen norms count no batches, so they may be missing.
    """
    return next((head for head in (*model.head_modules, BATCH_COUNTS) if head in name.split(".")), "")


def load_detector_to_train(args: SceneArguments, fields: dict[str, Any]) -> PreTrainedModel:
    """Load ``model_name_or_path`` for the classes of the data, and log which weights are new.

    A model of transformers' own class is trained with the losses of all decoder layers, as in the paper, unless the
    arguments say otherwise: its configuration disables auxiliary losses by default.

    Args:
        fields: see `build_detector`.

    Raises:
        ValueError: weights that do not depend on the data do not fit.
    """
    saved, kind = load_config(args.model_name_or_path, "model_name_or_path", trust_remote_code=None), model_class(args)
    fields_of_kind = kind.config_class.__dataclass_fields__
    native = saved.model_type != kind.config_class.model_type and "auxiliary_loss" in fields_of_kind
    earlier, auxiliary = saved.id2label, {"auxiliary_loss": True} if native else {}
    chosen = dict(args.model)
    queries = chosen.pop("num_queries", saved.num_queries)
    model, new = load_to_train(
        kind,
        args.model_name_or_path,
        head_of,
        chosen,
        resized="|".join(kind.classifier_modules),
        **{**auxiliary, **fields},
    )
    if len(earlier) == len(fields["id2label"]) and earlier != fields["id2label"]:
        new |= {fresh_head(model, name) for name in layers_of(model, kind.classifier_modules, nn.Linear)}
    if queries != saved.num_queries:
        new |= resize_queries(model, queries)
    if new:
        log.warning(
            "weights that model_name_or_path does not have are initialised randomly: %s", ", ".join(sorted(new))
        )
    return model


def layers_of(model: PreTrainedModel, modules: tuple[str, ...], kind: type[nn.Module]) -> list[str]:
    """Return the full names of the layers of a kind in the modules with these names, or that they are."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kind) and not {*modules}.isdisjoint(name.split("."))
    ]


def resize_queries(model: PreTrainedModel, number: int) -> set[str]:
    """Change the number of queries: keep the first ones, and initialise further ones at random.

    Returns:
        Names of the weights that have new rows.
    """
    changed = set()
    for name in layers_of(model, model.query_modules, nn.Embedding):
        old = model.get_submodule(name)
        new = nn.Embedding(number, old.embedding_dim)
        model._init_weights(new)
        kept = min(number, old.num_embeddings)
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
        if number > kept:
            changed.add(f"{name}.weight")
    model.config.num_queries = number
    return changed


def warn_of_batch_norm(model: PreTrainedModel, divided: bool) -> None:
    """Warn that a step depends on how it is divided if the backbone has batch norms.

    Args:
        divided: a step has several micro-batches or processes.
    """
    if divided and getattr(model.config, "backbone_norm", None) == "batch":
        log.warning(
            'backbone_norm is "batch": its statistics are of one micro-batch on one process, so a step '
            'differs slightly from one on the whole batch; "group" and "frozen" norms avoid this'
        )
