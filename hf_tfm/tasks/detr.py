"""A DETR to train: new, or from a pretrained one that may have other classes or another number of queries."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..hub.loading import load_config
from ..hub.pretrained import load_to_train
from ..memory import new_model
from ..models.backbones import TimmFeatures
from ..models.configuration_detr import TfmDetrConfig
from .model_fields import fresh_head, new_config
from .scenes import SceneArguments

log = logging.getLogger(__name__)

CLASSIFIER, QUERIES = "class_labels_classifier", "query_position_embeddings"  # modules whose size the data decides
HEADS = (CLASSIFIER, "bbox_predictor", "mask_head", "bbox_attention", "num_batches_tracked")


def build_detr(kind: type[PreTrainedModel], args: SceneArguments, fields: dict[str, Any]) -> PreTrainedModel:
    """Return the model to train, with random weights or those of ``model_name_or_path``.

    Args:
        kind: class of the model.
        fields: of the configuration, decided by the data.
    """
    if args.model_name_or_path:
        return load_detr(kind, args, fields)
    model = new_model(kind, new_config(TfmDetrConfig, args, **fields))
    if args.pretrained_backbone:
        next(module for module in model.modules() if isinstance(module, TimmFeatures)).load_pretrained()
    return model


def head_of(model: PreTrainedModel, name: str) -> str:
    """Return the head of a weight, for `load_to_train`.

    The batch counts of norms are among the heads: frozen norms count no batches, so they may be missing.
    """
    return next((head for head in HEADS if head in name.split(".")), "")


def load_detr(kind: type[PreTrainedModel], args: SceneArguments, fields: dict[str, Any]) -> PreTrainedModel:
    """Load ``model_name_or_path`` for the classes of the data, and log which weights are new.

    A model of transformers' own class is trained with the losses of all decoder layers, as in the paper, unless the
    arguments say otherwise: its configuration disables auxiliary losses by default.

    Args:
        kind, fields: see `build_detr`.

    Raises:
        ValueError: weights that do not depend on the data do not fit.
    """
    saved = load_config(args.model_name_or_path, "model_name_or_path", trust_remote_code=None)
    earlier, auxiliary = saved.id2label, {"auxiliary_loss": True} if saved.model_type == "detr" else {}
    chosen = dict(args.model)
    queries = chosen.pop("num_queries", saved.num_queries)
    model, new = load_to_train(
        kind, args.model_name_or_path, head_of, chosen, resized=CLASSIFIER, **{**auxiliary, **fields}
    )
    if len(earlier) == len(fields["id2label"]) and earlier != fields["id2label"]:
        new.add(fresh_head(model, name_of(model, CLASSIFIER)))
    if queries != saved.num_queries:
        new |= resize_queries(model, queries)
    if new:
        log.warning(
            "weights that model_name_or_path does not have are initialised randomly: %s", ", ".join(sorted(new))
        )
    return model


def name_of(model: PreTrainedModel, module: str) -> str:
    """Return the full name of the only module called ``module``."""
    return next(name for name, _ in model.named_modules() if name.split(".")[-1] == module)


def resize_queries(model: PreTrainedModel, number: int) -> set[str]:
    """Change the number of queries: keep the first ones, and initialise further ones at random.

    Returns:
        Names of the weights that have new rows.
    """
    name = name_of(model, QUERIES)
    old = model.get_submodule(name)
    new = nn.Embedding(number, old.embedding_dim)
    model._init_weights(new)
    kept = min(number, old.num_embeddings)
    with torch.no_grad():
        new.weight[:kept] = old.weight[:kept]
    setattr(model.get_submodule(name.rpartition(".")[0]), QUERIES, new)
    model.config.num_queries = number
    return {f"{name}.weight"} if number > kept else set()


def warn_of_batch_norm(model: PreTrainedModel, divided: bool) -> None:
    """Warn that a step depends on how it is divided if the backbone has batch norms.

    Args:
        divided: a step has several micro-batches or processes.
    """
    if divided and model.config.backbone_norm == "batch":
        log.warning(
            'backbone_norm is "batch": its statistics are of one micro-batch on one process, so a step is not quite '
            'that of the whole batch; "group" and "frozen" norms make it so'
        )
