"""Registration with transformers' Auto classes, and the switch for code that travels with saved models."""

import importlib

import transformers

from . import models

FAMILIES = (
    models.TfmTransformerConfig,
    models.TfmViTConfig,
    models.TfmMAEConfig,
    models.TfmDetrConfig,
    models.TfmBertConfig,
    models.TfmGPTConfig,
)


def classes(config_class: type) -> dict[str, type]:
    """The classes of a family by Auto class, read from the table that also becomes config.json's ``auto_map``."""
    found = {}
    for auto_class, path in config_class.auto_classes.items():
        module, name = path.split(".")
        found[auto_class] = getattr(importlib.import_module(f"{models.__name__}.{module}"), name)
    return found


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel`` ... know every family. Safe to call again."""
    for config_class in FAMILIES:
        for auto_class, registered in classes(config_class).items():
            auto = getattr(transformers, auto_class)
            if auto is transformers.AutoConfig:
                auto.register(config_class.model_type, config_class, exist_ok=True)
            else:
                auto.register(config_class, registered, exist_ok=True)
                # The names a pipeline looks up before it says that it does not know a model.
                auto._model_mapping._model_mapping[config_class.model_type] = registered.__name__


def carry_code(enabled: bool) -> None:
    """Whether `save_pretrained` and `push_to_hub` put the code beside the weights; on by default.

    Off, config.json has no ``auto_map``, and loading needs ``import hf_tfm``.
    """
    for config_class in FAMILIES:
        for auto_class, owner in classes(config_class).items():
            owner._auto_class = auto_class if enabled else None
