"""Models of timm and torchvision for evaluation beside ours: ``timm:NAME`` and ``torchvision:NAME``.

name -> metadata of its weights -> classes, preprocessing, published scores -> network -> `PreTrainedModel`, processor

The adapters take and return what models of transformers do, so that tasks evaluate them like any other.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import patch

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, DetrImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput

from ..command import cause
from ..finite import check_finite
from ..models.boxes import detections_as_queries
from ..models.patches import unpadded_sizes
from ..values import closest
from .loading import explained, load_config, read_json

LOCAL_FOLDER = "timm:local-dir:"  # timm's name for a folder in its format, which transformers reads as it is
PUBLISHED = Path(__file__).parent.parent / "published.json"
WEIGHT_FILES, SUFFIXES = ("model.safetensors", "pytorch_model.bin"), (".safetensors", ".pth", ".bin", ".npz")
# torchvision's names of scores, in percent, and ours, in [0, 1]
SCORES = {"acc@1": "accuracy", "acc@5": "top5_accuracy", "box_map": "AP"}
HASH_LENGTH = 8  # of the prefix of the SHA-256 hash in the names of torchvision's files


class Published(TypedDict):
    """A score in [0, 1] that others published for a model, with the data set it is of and where it stands."""

    name: str
    value: float
    data: str
    source: str


class ExternalForImageClassification(PreTrainedModel):
    """A classifier of another library.

    Args:
        config: with the names of its classes.
        network: (B, 3, H, W) -> logits (B, C).
    """

    config_class, main_input_name = PreTrainedConfig, "pixel_values"

    def __init__(self, config: PreTrainedConfig, network: nn.Module):
        super().__init__(config)
        self.network = network

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """(B, 3, H, W) -> logits (B, C)."""
        return ImageClassifierOutput(logits=self.network(pixel_values))


class ExternalForObjectDetection(PreTrainedModel):
    """A detector of torchvision, which resizes, scales and suppresses duplicates itself.

    Args:
        config: with the names of its classes; torchvision counts them from 1, the model's label 0 is "no object".
        network: list of images (3, h, w) in [0, 1] -> list of boxes (n, 4) xyxy in pixels, labels (n,), scores (n,).
    """

    config_class, main_input_name = PreTrainedConfig, "pixel_values"

    def __init__(self, config: PreTrainedConfig, network: nn.Module):
        super().__init__(config)
        self.network = network

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> ModelOutput:
        """(B, 3, H, W) and the mask of padding (B, H, W) -> logits (B, Q, C + 1), boxes (B, Q, 4)."""
        images = list(pixel_values)
        if pixel_mask is not None:
            sizes = unpadded_sizes(pixel_mask).tolist()
            images = [image[:, :h, :w] for image, (h, w) in zip(images, sizes, strict=True)]
        found = self.network(images)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        logits, boxes = detections_as_queries(found, sizes, self.config.num_labels)
        return ModelOutput(logits=logits, pred_boxes=boxes)


class TransformProcessor:
    """A transform of timm or torchvision in the form of an image processor.

    Args:
        transform: image -> (3, H, W).
    """

    def __init__(self, transform: Callable[[Image], Tensor]):
        self.transform = transform

    def __call__(self, images: Image, return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"pixel_values": self.transform(images)[None]}


class ExternalModel(ABC):
    """A model of another library.

    Args:
        name: in that library.

    Raises:
        ValueError: there is no model of this name, or it is for another task.
        ImportError: the library is not installed.
    """

    library: str

    def __init__(self, name: str):
        self.name = name

    @property
    def full_name(self) -> str:
        """As given to a command."""
        return f"{self.library}:{self.name}"

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the classes, in order."""

    @property
    def detects(self) -> bool:
        """True for a detector, False for an image classifier."""
        return False

    @property
    def adapter(self) -> type[PreTrainedModel]:
        """Class of the loaded model."""
        return ExternalForObjectDetection if self.detects else ExternalForImageClassification

    @property
    def config(self) -> PreTrainedConfig:
        """The names of the classes in the form of a configuration."""
        names = self.classes
        return PreTrainedConfig(
            architectures=[self.adapter.__name__],
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )

    @abstractmethod
    def build(self, file: Path | None, random: bool) -> nn.Module:
        """Build the network, with weights of a file, random ones, or those of the library."""

    @abstractmethod
    def processor(self, network: nn.Module) -> BaseImageProcessor | TransformProcessor:
        """Return the preprocessing that belongs to the weights."""

    def load(self, weights: str | None = None, random_weights: bool = False) -> tuple[PreTrainedModel, Any]:
        """Return the model in eval mode, and its image processor.

        Args:
            weights: file with its weights, or folder with such a file; default, the library downloads them.
            random_weights: draw them at random instead.

        Raises:
            LoadingError: weights cannot be read, do not fit or are not finite.
        """
        file = weights_file("weights", weights) if weights else None
        with explained("weights" if file else "model", str(file or self.full_name)):
            if not (file or random_weights or self.has_weights):
                raise ValueError("there are no weights for this name: give weights FILE or random_weights true")
            try:
                network = self.build(file, random_weights)
            except OSError as error:
                if file or random_weights:
                    raise
                reason = f"its weights cannot be downloaded ({cause(error)})"
                raise ValueError(f"{reason}: give weights FILE or random_weights true") from error
            check_finite(network, "it")
        return self.adapter(self.config, network).eval(), self.processor(network)

    @property
    @abstractmethod
    def has_weights(self) -> bool:
        """True if the library has weights of this name."""

    @abstractmethod
    def published(self, file: Path | None = None) -> list[Published]:
        """Return published scores.

        Args:
            file: the weights in use; those of the library by default. Scores of other weights are left out.
        """


class TimmModel(ExternalModel):
    """An image classifier of timm."""

    library = "timm"

    def __init__(self, name: str):
        super().__init__(name)
        import timm  # slow to import

        if not timm.is_model(name):
            raise ValueError(f'timm has no model "{name}"{closest(name.split(".")[0], timm.list_models())}')
        try:
            self.metadata = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            architecture = name.split(".")[0]
            known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
            raise ValueError(f'timm has no weights "{name}"; it has {known}') from error
        if not self.metadata.num_classes:
            raise ValueError(f'"{name}" of timm has no classifier, only features')

    @property
    def classes(self) -> list[str]:
        """See `ExternalModel`: those of ImageNet or a larger set of its synsets; LABEL_0 and so on if unknown."""
        import timm

        data, count = self.metadata, self.metadata.num_classes
        if data.label_names:
            return list(data.label_names)
        subset = timm.data.infer_imagenet_subset({"num_classes": count})
        return timm.data.ImageNetInfo(subset).label_descriptions() if subset else [f"LABEL_{i}" for i in range(count)]

    @property
    def has_weights(self) -> bool:
        """See `ExternalModel`."""
        return self.metadata.has_weights

    def build(self, file: Path | None, random: bool) -> nn.Module:
        """See `ExternalModel`."""
        import timm

        options = {"pretrained_cfg_overlay": {"file": str(file)}} if file else {}
        return timm.create_model(self.name, pretrained=not random, **options)

    def processor(self, network: nn.Module) -> TransformProcessor:
        """See `ExternalModel`."""
        import timm

        options = timm.data.resolve_model_data_config(network)
        return TransformProcessor(timm.data.create_transform(**options, is_training=False))

    def published(self, file: Path | None = None) -> list[Published]:
        """See `ExternalModel`: timm's own results; its metadata cannot tell whether a file holds its weights."""
        return published_scores(self.full_name) if file is None else []


class TorchvisionModel(ExternalModel):
    """An image classifier or a detector of torchvision, NAME or NAME.WEIGHTS, such as resnet50.IMAGENET1K_V1."""

    library = "torchvision"

    def __init__(self, name: str):
        super().__init__(name)
        import torchvision

        models = torchvision.models
        self.architecture, _, chosen = name.partition(".")
        names = {kind: models.list_models(module=module) for kind, module in self.modules().items()}
        known = [one for group in names.values() for one in group]
        if self.architecture not in known:
            if self.architecture in models.list_models():
                raise ValueError(f'"{name}" of torchvision is neither an image classifier nor a detector')
            raise ValueError(f'torchvision has no model "{name}"{closest(self.architecture, known)}')
        self.is_detector = self.architecture in names["detection"]
        kind = models.get_model_weights(self.architecture)
        if chosen and chosen not in kind.__members__:
            raise ValueError(f'torchvision has no weights "{name}"; it has {", ".join(kind.__members__) or "none"}')
        # Some models have no weights at all; their classes are unknown.
        self.weights = kind[chosen] if chosen else next(iter(kind.__members__.values()), None) and kind.DEFAULT

    @staticmethod
    def modules() -> dict[str, Any]:
        """Return the modules of torchvision with models for our tasks."""
        import torchvision

        return {"classification": torchvision.models, "detection": torchvision.models.detection}

    @property
    def detects(self) -> bool:
        """See `ExternalModel`."""
        return self.is_detector

    @property
    def classes(self) -> list[str]:
        """See `ExternalModel`: detectors keep the gaps of COCO's ids, as "N/A", but not category 0, "no object"."""
        if self.weights is None:
            return [f"LABEL_{i}" for i in range(1000)]
        return list(self.weights.meta["categories"][1 if self.detects else 0 :])

    @property
    def has_weights(self) -> bool:
        """See `ExternalModel`."""
        return self.weights is not None

    def build(self, file: Path | None, random: bool) -> nn.Module:
        """See `ExternalModel`."""
        import torchvision

        build = torchvision.models.get_model_builder(self.architecture)
        if random or self.weights is None:
            return build(weights=None, **({"weights_backbone": None} if self.detects else {}))
        if file is None:
            return build(weights=self.weights, progress=False)
        with weights_from(file):
            return build(weights=self.weights)

    def processor(self, network: nn.Module) -> BaseImageProcessor | TransformProcessor:
        """See `ExternalModel`: detectors only get pixels in [0, 1] here, they resize on their own."""
        if self.detects:
            return DetrImageProcessor(do_resize=False, do_normalize=False)
        if self.weights is None:
            from torchvision.transforms._presets import ImageClassification

            return TransformProcessor(ImageClassification(crop_size=224))
        return TransformProcessor(self.weights.transforms())

    def published(self, file: Path | None = None) -> list[Published]:
        """See `ExternalModel`: scores in torchvision's metadata; the name of its file has the hash of the weights."""
        import torchvision

        if self.weights is None or (file is not None and not self.has_hash(file)):
            return []
        source = f"torchvision {torchvision.__version__.partition('+')[0]}, metadata of {self.weights}"
        return [
            Published(name=SCORES[name], value=value / 100, data=data, source=source)
            for data, scores in self.weights.meta.get("_metrics", {}).items()
            for name, value in scores.items()
            if name in SCORES
        ]

    def has_hash(self, file: Path) -> bool:
        """Return True if a file has the hash in the name of torchvision's own file."""
        expected = Path(self.weights.url).stem.rpartition("-")[2]
        return hashlib.sha256(file.read_bytes()).hexdigest()[:HASH_LENGTH] == expected[:HASH_LENGTH]


LIBRARIES: dict[str, type[ExternalModel]] = {one.library: one for one in (TimmModel, TorchvisionModel)}


def external_model(model: str) -> ExternalModel | None:
    """Return the model of another library that ``timm:NAME`` or ``torchvision:NAME`` names; None for other names.

    Raises:
        ValueError: see `ExternalModel`.
    """
    library, colon, name = model.partition(":")
    if not colon or library not in LIBRARIES or model.startswith(LOCAL_FOLDER):
        return None
    try:
        return LIBRARIES[library](name)
    except ImportError as error:
        raise ImportError(f'model "{model}" needs {library}: pip install {library}') from error


def folder_or_id(model: str) -> str:
    """Return the folder of ``timm:local-dir:FOLDER``; other names are returned as they are."""
    return model.removeprefix(LOCAL_FOLDER)


def model_config(model: str, revision: str | None = None, trust_remote_code: bool | None = False) -> PreTrainedConfig:
    """Return the configuration of any model that tasks evaluate, see `load_config` and `ExternalModel`."""
    external = external_model(model)
    return load_config(model, "model", revision, trust_remote_code) if external is None else external.config


def weights_file(argument: str, path: str) -> Path:
    """Return the file with weights: the given one, or the one in the given folder.

    Args:
        argument: name of the argument with the path, for errors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the folder has several.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{argument} {path} does not exist")
    if place.is_file():
        return place
    found = [place / name for name in WEIGHT_FILES if (place / name).is_file()]
    found = found[:1] or sorted(one for one in place.iterdir() if one.suffix in SUFFIXES)
    if len(found) != 1:
        reason = f"has {len(found)} files of weights" if found else "has no file of weights"
        raise ValueError(f"{argument} {path} {reason}: give the file")
    return found[0]


@contextmanager
def weights_from(file: Path) -> Iterator[None]:
    """Let torchvision read weights of a file where it would download them, and adapt its model to them as it does."""
    import torchvision
    from safetensors.torch import load_file

    def read(weights: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)

    with patch.object(torchvision.models.WeightsEnum, "get_state_dict", read):
        yield


@cache
def published_table() -> dict[str, Any]:
    """Return the content of published.json: ``sources`` by name, and ``models`` with their scores."""
    return read_json(PUBLISHED)


def published_scores(model: str) -> list[Published]:
    """Return the scores that published.json has for a model that can be evaluated, ``timm:NAME``."""
    table = published_table()
    return [
        Published(**{**score, "source": table["sources"][score["source"]]["title"]})
        for entry in table["models"]
        if entry.get("evaluate") == model
        for score in entry["scores"]
    ]
