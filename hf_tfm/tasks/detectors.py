"""A detector to train: new, or from a pretrained one that may have other classes or another number of queries.

The class of a detector says what depends on the data: ``classifier_modules``, ``query_modules`` and ``head_modules``,
names of modules, see `TfmDetrPreTrainedModel`; and ``image_processor_name``.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..data.pixels import Channels, pixel_scale
from ..finite import first_not_finite
from ..hub.loading import explained, load_config
from ..hub.pretrained import load_to_train
from ..models.backbones import Backbone, TimmFeatures
from ..models.configuration_backbone import HUB, LOCAL, is_timm, read_source
from .model_fields import build_new, fresh_head, new_config
from .scenes import SceneArguments

log = logging.getLogger(__name__)

BATCH_COUNTS = "num_batches_tracked"
HEAD_NORM = r"^(\w+\.)?(layernorm|layer_norm|norm)\."  # norm before a classifier; a backbone has one for each map


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
        backbone = next(module for module in model.modules() if isinstance(module, Backbone))
        load_backbone(backbone, args.backbone_source)
    return model


def load_backbone(backbone: Backbone, source: str | None) -> None:
    """Load pretrained weights into the backbone of a new detector.

    Args:
        source: folder or Hub id; None for timm's weights.

    Raises:
        LoadingError: a folder has no weights in safetensors, or weights are missing, not finite or of another shape.
    """
    if source is None:
        backbone.load_pretrained()
    elif isinstance(backbone, TimmFeatures):
        with explained("backbone", source, code_option=False):
            load_timm_weights(backbone, source)
    else:
        config = copy.deepcopy(backbone.body.config)
        loaded, _ = load_to_train(
            type(backbone.body), source, norm_of, argument="backbone", unused=HEAD_NORM, config=config
        )
        own = backbone.body.state_dict()  # frozen norms count no batches
        weights = loaded.state_dict()
        kept = {name: value for name, value in weights.items() if name in own or BATCH_COUNTS not in name}
        backbone.body.load_state_dict(kept)


def scale_of_backbone(source: str, mean: Channels | None, std: Channels | None) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of the pixels that a pretrained backbone reads, see `pixel_scale`.

    Args:
        source: folder or Hub id.
    """
    fields = read_source(source)
    if is_timm(fields):
        found = fields.get("pretrained_cfg") or fields
        mean, std = mean or found.get("mean"), std or found.get("std")
    return pixel_scale(source, mean, std, argument="backbone")


def load_timm_weights(backbone: TimmFeatures, source: str) -> None:
    """Load the weights of a folder or Hub id of a timm model; see `load_backbone`.

    Raises:
        ValueError: it has no safetensors file, or a weight is not finite.
        RuntimeError: weights are missing or of another shape.
    """
    is_folder = Path(source).is_dir()
    if is_folder and not (Path(source) / SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"it has no {SAFE_WEIGHTS_NAME}; without weights, give pretrained_backbone false")
    name = f"{LOCAL if is_folder else HUB}{source}"
    import timm

    timm.create_model(name, pretrained=True)  # checks names and shapes, which extracting features does not
    backbone.load_pretrained(name)
    if found := first_not_finite(backbone):
        raise ValueError(f"its weight {found} holds values that are not finite")


def norm_of(model: PreTrainedModel, name: str) -> str:
    """Return the name of the norm of a feature map that a weight belongs to, or "": classifiers lack these norms."""
    return name.rpartition(".")[0] if "hidden_states_norms." in name else ""


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
        rows = number * old.num_embeddings // model.config.num_queries  # some hold several groups of queries
        new = nn.Embedding(rows, old.embedding_dim)
        model._init_weights(new)
        kept = min(rows, old.num_embeddings)
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
        if rows > kept:
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
