"""Table of model families: a family is one line of `FAMILIES`.

Exports of the package, registration with transformers' Auto classes, conversions and tests are derived from it. Other
packages add families with `register_family` or through entry points of the group "hf_tfm.families".
"""

import importlib
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from .models.configuration_bert import TfmBertConfig
from .models.configuration_convlstm import TfmConvLSTMConfig
from .models.configuration_deformable_detr import TfmDeformableDetrConfig
from .models.configuration_detr import TfmDetrConfig
from .models.configuration_faster_rcnn import TfmFasterRCNNConfig
from .models.configuration_gpt import TfmGPTConfig
from .models.configuration_long_range import TfmLongRangeConfig
from .models.configuration_mae import TfmMAEConfig
from .models.configuration_rnn_seq2seq import TfmRNNSeq2SeqConfig
from .models.configuration_swin import TfmSwinConfig
from .models.configuration_transformer import TfmTransformerConfig
from .models.configuration_video_transformer import TfmVideoTransformerConfig
from .models.configuration_vit import TfmViTConfig
from .plugins import FAMILIES as PLUGINS
from .plugins import load_plugins
from .values import shown


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        name: short name, for instance in ``--architecture``.
        config: configuration class. Its ``auto_classes``, {Auto class: "module.Class"} of modules next to it, become
            the ``auto_map`` of saved models; ``model_type`` is the type in config.json.
        conversions: modules with a tuple ``CONVERSIONS``, by absolute name or relative to `hf_tfm.conversion`.
        reads: other model types, of transformers or of another family, whose files its classes load as they are, to
            train them further.
    """

    name: str
    config: type[PreTrainedConfig]
    conversions: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def auto_classes(self) -> dict[str, str]:
        """{Auto class: "module.Class"} of the configuration.

        Raises:
            ValueError: it has none.
        """
        found: dict[str, str] | None = getattr(self.config, "auto_classes", None)
        if found is None:
            raise ValueError(f'family "{self.name}": its configuration {self.config.__name__} has no auto_classes')
        return found

    def classes(self) -> dict[str, type[Any]]:
        """Return {Auto class: class}."""
        package = self.config.__module__.rpartition(".")[0]
        found = {}
        for auto_class, path in self.auto_classes.items():
            module, name = path.split(".")
            found[auto_class] = getattr(importlib.import_module(f"{package}.{module}" if package else module), name)
        return found


FAMILIES: list[Family] = [
    Family("transformer", TfmTransformerConfig, (".marian_pegasus",)),
    Family("vit", TfmViTConfig, (".vit", ".deit", ".timm_vit"), reads=("vit", "tfm_mae", "vit_mae")),
    Family("mae", TfmMAEConfig, (".mae", ".mae_authors"), reads=("vit_mae",)),
    Family("swin", TfmSwinConfig, (".swin", ".timm_swin", ".torchvision_swin"), reads=("swin",)),
    Family("detr", TfmDetrConfig, (".detr", ".detr_authors"), reads=("detr",)),
    Family("deformable_detr", TfmDeformableDetrConfig, (".deformable_detr",), reads=("deformable_detr",)),
    Family("faster_rcnn", TfmFasterRCNNConfig),
    Family("bert", TfmBertConfig, (".bert", ".distilbert", ".tinybert"), reads=("bert",)),
    Family("long_range", TfmLongRangeConfig),
    Family("gpt", TfmGPTConfig, (".gpt2",), reads=("gpt2",)),
    Family("rnn_seq2seq", TfmRNNSeq2SeqConfig),
    Family("convlstm", TfmConvLSTMConfig),
    Family("video_transformer", TfmVideoTransformerConfig),
]


@dataclass(frozen=True)
class Head:
    """The models of all families for one Auto class, such as image classifiers; a task trains those of one head.

    Args:
        auto_class: name of the Auto class.
        main_input: ``main_input_name`` of the models, if the Auto class has models of several modalities.
    """

    auto_class: str
    main_input: str | None = None

    def families(self) -> dict[str, Family]:
        """Return the families that have such models, by name."""
        found = {family.name: family for family in FAMILIES if self.auto_class in family.auto_classes}
        if self.main_input is None:
            return found
        return {
            name: family
            for name, family in found.items()
            if family.classes()[self.auto_class].main_input_name == self.main_input
        }

    def own_types(self) -> list[str]:
        """Return the model types of these families."""
        return [family.config.model_type for family in self.families().values()]

    def model_types(self) -> list[str]:
        """Return all model types that these families train further: their own, and those that they read."""
        read = [model_type for family in self.families().values() for model_type in family.reads]
        return list(dict.fromkeys([*self.own_types(), *read]))

    def config_class(self, architecture: str | None) -> type[Any]:
        """Return the configuration class of a family for new models.

        Args:
            architecture: name of the family.

        Raises:
            ValueError: no family of this name has such models; the message lists those that have.
        """
        found = self.families()
        if architecture not in found:
            raise ValueError(f"architecture must be one of {', '.join(found)}, got {shown(architecture)}")
        return found[architecture].config

    def model_class(self, model_type: str) -> type[Any]:
        """Return the class that trains models of a type, new or saved ones.

        Raises:
            ValueError: no family reads models of this type; the message lists those that are read.
        """
        found = list(self.families().values())
        for family in (
            *(family for family in found if family.config.model_type == model_type),
            *(family for family in found if model_type in family.reads),
        ):
            return family.classes()[self.auto_class]
        raise ValueError(f"model_type must be one of {', '.join(self.model_types())}, got {shown(model_type)}")

    def from_pretrained(self, source: str, *args: Any, **options: Any) -> Any:
        """Load a model as its family's class, see `model_class`, as ``from_pretrained`` of an Auto class does."""
        code = options.get("trust_remote_code", False)
        config = AutoConfig.from_pretrained(source, revision=options.get("revision"), trust_remote_code=code)
        return self.model_class(config.model_type).from_pretrained(source, *args, **options)


IMAGE_CLASSIFIER = Head("AutoModelForImageClassification")
MASKED_AUTOENCODER = Head("AutoModelForPreTraining", "pixel_values")
DETECTOR = Head("AutoModelForObjectDetection")
PANOPTIC_DETECTOR = Head("AutoModelForUniversalSegmentation")
MASKED_LM = Head("AutoModelForMaskedLM")
NEXT_SENTENCE_LM = Head("AutoModelForPreTraining", "input_ids")  # masked tokens, and whether sentences follow
CAUSAL_LM = Head("AutoModelForCausalLM")
TEXT_CLASSIFIER = Head("AutoModelForSequenceClassification")
SEQ2SEQ = Head("AutoModelForSeq2SeqLM")
VIDEO_FORECASTER = Head("AutoModelForTimeSeriesPrediction", "pixel_values_videos")


def register_family(family: Family) -> None:
    """Add a family and register it with transformers' Auto classes. Can be called repeatedly.

    Raises:
        ValueError: another family has this name or model type.
    """
    for known in FAMILIES:
        if known == family:
            break
        if known.name == family.name or known.config.model_type == family.config.model_type:
            raise ValueError(
                f'family "{family.name}" of model type "{family.config.model_type}": there is a family "{known.name}" '
                f'of model type "{known.config.model_type}" already'
            )
    else:
        FAMILIES.append(family)
    for auto_class, registered in family.classes().items():
        auto = getattr(transformers, auto_class)
        if auto is transformers.AutoConfig:
            auto.register(family.config.model_type, family.config, exist_ok=True)
        else:
            auto.register(family.config, registered, exist_ok=True)
            # Pipelines look up these names before they report a model as unsupported.
            auto._model_mapping._model_mapping[family.config.model_type] = registered.__name__


def register() -> None:
    """Register every family, including those of plug-ins, with transformers' Auto classes. Can be called
    repeatedly."""
    for family in [*FAMILIES, *(family for _, family in load_plugins(PLUGINS))]:
        register_family(family)


def family_of(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        ValueError: there is none; the message lists all names.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f'there is no model family "{name}"; available: {", ".join(one.name for one in FAMILIES)}')


def carry_code(enabled: bool) -> None:
    """Set whether `save_pretrained` and `push_to_hub` save the code with the weights; on by default.

    If it is off, config.json has no ``auto_map``, and loading needs ``import hf_tfm``.
    """
    for family in FAMILIES:
        for auto_class, owner in family.classes().items():
            owner._auto_class = auto_class if enabled else None


def exports() -> dict[str, Any]:
    """Return {name: class} of all families of this package, for its namespace."""
    own = [family for family in FAMILIES if family.config.__module__.startswith(f"{__package__}.")]
    return {kind.__name__: kind for family in own for kind in family.classes().values()}


def stub() -> str:
    """Return the content of __init__.pyi, which lists `exports` for type checkers."""
    kinds = sorted(exports().values(), key=lambda kind: kind.__name__)
    modules = [(kind.__module__.replace(__package__, "", 1), kind.__name__) for kind in kinds]
    names = [(".families", "carry_code"), (".families", "register"), *sorted(modules)]
    lines = [f"from {module} import {name} as {name}" for module, name in names]
    return "\n".join(
        ['"""Generated from hf_tfm/families.py by `make stubs`."""', "", *lines, "", "__version__: str", ""]
    )
