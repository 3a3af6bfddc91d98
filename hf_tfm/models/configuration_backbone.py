"""Configuration of a detector's backbone: a timm model, or a model of this package or of transformers.

name, folder or Hub id -> config.json -> ``backbone`` and ``backbone_kwargs`` (timm), or ``backbone_config``
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import CONFIG_NAME, cached_file, is_timm_available

from .configuration_swin import TfmSwinConfig
from .configuration_vit import TfmViTConfig
from .travel import READING

# Model types whose files `TfmViTBackbone` and `TfmSwinBackbone` read; their code is saved with a detector.
OWN = {
    **dict.fromkeys(("tfm_vit", "vit", "tfm_mae", "vit_mae"), TfmViTConfig),
    **dict.fromkeys(("tfm_swin", "swin"), TfmSwinConfig),
}
STAGES = ("out_features", "out_indices")
# Fields that describe a file or a head, and none that a backbone has.
UNUSED = {
    *PreTrainedConfig.__dataclass_fields__,
    *("auto_map", "num_labels", "torch_dtype", "_name_or_path", "output_attentions", "stage_names"),
}
# Arguments of timm that a detector decides, or that only a classifier has.
DECIDED = {"num_classes", "global_pool", "in_chans", "out_indices", "output_stride", "features_only", "pretrained"}
LOCAL, HUB = "local-dir:", "hf-hub:"  # prefixes of timm
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def source_of(backbone: str | None) -> str | None:
    """Return the folder or Hub id that ``backbone`` names; None for the name of a timm model.

    A folder in the working directory that is named like a timm model needs the prefix "local-dir:", or "./".
    """
    if backbone is None:
        return None
    for prefix in (LOCAL, HUB):
        if backbone.startswith(prefix):
            return backbone.removeprefix(prefix)
    if "/" in backbone or os.sep in backbone:
        return backbone
    return backbone if os.path.isdir(backbone) and not is_timm_model(backbone) else None


def is_timm_model(name: str) -> bool:
    """Return whether timm has a model of this name."""
    if is_timm_available():  # local import: slow; this condition is required by transformers' import check
        import timm

        return timm.is_model(name)
    return False


def read_source(source: str) -> dict[str, Any]:
    """Return the content of the config.json of a folder or Hub id.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path: str | None = str(Path(source, CONFIG_NAME))
    if Path(source).is_dir():
        if not Path(str(path)).is_file():
            raise ValueError(f"it has no {CONFIG_NAME}")
    else:
        try:
            path = cached_file(source, CONFIG_NAME) if HUB_ID.fullmatch(source) else None
        except OSError:
            path = None
        if path is None:
            raise ValueError("it is neither a local folder nor found on the Hub")
    try:
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
        raise ValueError(f"its {CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"its {CONFIG_NAME} must be a mapping, got {type(content).__name__}")
    return content


def is_timm(fields: dict[str, Any]) -> bool:
    """Return whether the content of a config.json is that of a timm model."""
    return "model_type" not in fields and isinstance(fields.get("architecture"), str)


def parse_backbone(fields: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a backbone.

    Args:
        fields: content of a config.json, of this package or of transformers.

    Raises:
        ValueError: the model type is unknown, cannot be a backbone, or a field has an invalid value.
    """
    model_type = fields.get("model_type")
    known = "model_type" in fields and (model_type in OWN or model_type in CONFIG_MAPPING)
    if not known and fields.get("auto_map"):
        raise ValueError(f"a {model_type} model brings its own code, which a detector cannot carry")
    if not known:
        raise ValueError(f"model_type must be one of this package or of transformers, got {model_type}")
    fields = {name: value for name, value in fields.items() if name not in ("architectures", "auto_map")}
    if model_type not in OWN:
        config = CONFIG_MAPPING[model_type].from_dict(fields)
        if not isinstance(config, BackboneConfigMixin):
            raise ValueError(f"a {model_type} model has no feature maps (it has no AutoBackbone class)")
        return config
    kind = OWN[model_type]
    if not model_type.startswith("tfm_"):  # files may leave out defaults of transformers, which differ from ours
        fields = CONFIG_MAPPING[model_type].from_dict(fields).to_dict()
    wanted = {*kind.__dataclass_fields__, *STAGES} - UNUSED
    return kind.from_dict({name: value for name, value in fields.items() if name in wanted})


def stored(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a backbone that a detector's config.json keeps; the detector selects its stages."""
    fields = {name: value for name, value in config.to_dict().items() if name not in UNUSED and name not in STAGES}
    return {"model_type": config.model_type, **fields}


def resolve_backbone(config: Any) -> None:
    """Replace a backbone given as a folder or Hub id by its configuration, so that a saved detector needs neither.

    Args:
        config: of a detector; its fields ``backbone``, ``backbone_kwargs``, ``backbone_config`` and ``dilation`` are
            set.

    Raises:
        ValueError: the model is unknown, cannot be a backbone, or reads images with another number of channels.
    """
    fields, label = config.backbone_config, "backbone_config"
    if fields is None and not READING.get() and (source := source_of(config.backbone)):
        label = f'backbone "{config.backbone}"'
        try:
            fields = read_source(source)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    if fields is None:
        return
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    if fields.get("model_type") == "timm_backbone" and label == "backbone_config":  # a file of transformers' DETR
        config.backbone, config.backbone_config = fields["backbone"], None
        config.dilation = fields.get("output_stride") == 16 or config.dilation
        if fields.get("output_stride") == 8:
            config.backbone_output_stride = 8
    elif is_timm(fields):
        if is_timm_available() and not is_timm_model(fields["architecture"]):
            raise ValueError(f'{label}: timm has no model "{fields["architecture"]}"')
        arguments = fields.get("model_args") or {}
        channels = arguments.get("in_chans") or (fields.get("pretrained_cfg") or fields).get("input_size", [3])[0]
        require_channels(label, channels, config.num_channels)
        config.backbone, config.backbone_config = fields["architecture"], None
        config.backbone_kwargs = {name: value for name, value in arguments.items() if name not in DECIDED} or None
    else:
        try:
            found = parse_backbone(fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{label}: {' '.join(str(error).split())}") from error
        require_channels(label, getattr(found, "num_channels", 3), config.num_channels)
        config.backbone, config.backbone_kwargs, config.backbone_config = None, None, stored(found)


def require_channels(label: str, channels: int, wanted: int) -> None:
    """Raise if a backbone reads images with another number of channels than the detector."""
    if channels != wanted:
        raise ValueError(f"{label}: num_channels must be {wanted}, those of the detector's images, got {channels}")


def check_backbone(config: Any) -> None:
    """Validate the fields of a detector's backbone.

    Raises:
        ValueError: they contradict each other.
    """
    if config.backbone_config is None and config.backbone is None:
        raise ValueError("backbone must be the name of a timm model, a folder or a Hub id, got None")
    if config.backbone_config is not None and config.output_stride is not None:
        name = "dilation must be false" if config.dilation else "backbone_output_stride must be null"
        raise ValueError(
            f"{name} for a backbone of type {config.backbone_config['model_type']}: only timm models can dilate their "
            "last stages"
        )


def fields_without_dilation(size: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a named size, without its dilation if ``fields`` name a backbone that is no timm model."""
    if "dilation" not in size or not has_own_backbone(fields):
        return size
    return {name: value for name, value in size.items() if name != "dilation"}


def has_own_backbone(fields: dict[str, Any]) -> bool:
    """Return whether fields of a detector name a backbone that is no timm model; False for one that is not found."""
    if fields.get("backbone_config") is not None:
        return True
    try:
        return (source := source_of(fields.get("backbone"))) is not None and not is_timm(read_source(source))
    except ValueError:
        return False
