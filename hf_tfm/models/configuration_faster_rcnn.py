"""Configuration of Faster R-CNN with a feature pyramid (Ren et al. 2015, arXiv:1506.01497; Lin et al. 2017,
arXiv:1612.03144)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .checks import fields_of_size, require_at_least, require_choice, require_common
from .configuration_backbone import check_backbone, resolve_backbone
from .configuration_detr import NORMS
from .travel import TravellingConfig

# "base" is torchvision's model with a ResNet-50. The others are ours, for small images and training from scratch, with
# the backbones of DETR's sizes.
SIZES = {
    "tiny": {
        "backbone": "test_resnet",  # the smallest in timm
        "backbone_norm": "batch",
        "backbone_frozen_stages": 0,
        "d_model": 64,
        "representation_size": 256,
        "anchor_size": 8,
        "num_proposals": 256,
        "box_batch_size_per_image": 64,
    },
    "small": {
        "backbone": "resnet18",
        "backbone_norm": "batch",
        "backbone_frozen_stages": 0,
        "d_model": 128,
        "representation_size": 512,
        "num_proposals": 1000,
        "box_batch_size_per_image": 128,
    },
    "base": {},
}
LEAST_1 = (
    "num_channels",
    "num_queries",
    "d_model",
    "representation_size",
    "anchor_size",
    "num_proposals",
    "box_batch_size_per_image",
)


@strict
class TfmFasterRCNNConfig(TravellingConfig):
    """Configuration of a `TfmFasterRCNNForObjectDetection`. Defaults to torchvision's Faster R-CNN with a ResNet-50.

    Args:
        backbone: model that computes the feature maps, of strides 4 to 32: name of a timm model; or folder or Hub id
            of a timm model, or of a model of this package or of transformers, which is replaced by its configuration
            in ``backbone_config``, or by the name of the timm model; its weights are not loaded.
        backbone_kwargs: arguments of the timm model.
        backbone_config: configuration of a backbone that is no timm model, as a dict with its ``model_type``.
        backbone_norm: how to convert its batch norms: "frozen" (fixed statistics and affine parameters, for pretrained
            weights), "batch" (unchanged; uses the statistics of the micro-batch on each rank, so a step depends on how
            it is split) or "group" (group norm, for training from scratch with few images per batch).
        backbone_norm_momentum: momentum of the running statistics with "batch".
        backbone_frozen_stages: number of frozen stages, in addition to the stem; 0 freezes nothing.
        num_channels: number of image channels.
        num_queries: maximum number of detections in an image.
        d_model: channels of the feature pyramid.
        representation_size: hidden size of the box head.
        anchor_size: side of the anchors of the finest level, in pixels; that of the next is twice as large.
        num_proposals: number of proposals of an image in training, before (on each level) and after non-maximum
            suppression; half as many in evaluation.
        box_batch_size_per_image: number of proposals that the loss samples from an image.
        initializer_range: standard deviation of the initial weights of the proposal network.
        score_threshold: minimum score of a detection.
        nms_threshold: overlap (IoU) above which the lower of two detections of a class is dropped.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_faster_rcnn"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_faster_rcnn.TfmFasterRCNNConfig",
        "AutoModel": "modeling_faster_rcnn.TfmFasterRCNNModel",
        "AutoModelForObjectDetection": "modeling_faster_rcnn.TfmFasterRCNNForObjectDetection",
    }
    attribute_map: ClassVar = {"hidden_size": "d_model"}
    base_model_fsdp_plan: ClassVar = {"backbone": "free_full_weight", "fpn": "free_full_weight"}
    # Detections are returned as the probabilities of a softmax.
    class_scoring: ClassVar = "softmax"
    output_stride: ClassVar = None  # of the backbone: its own

    backbone: str | None = "resnet50"
    backbone_kwargs: dict[str, Any] | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    backbone_norm: str = "frozen"
    backbone_norm_momentum: float = 0.1
    backbone_frozen_stages: int = 1
    num_channels: int = 3
    num_queries: int = 100
    d_model: int = 256
    representation_size: int = 1024
    anchor_size: int = 32
    num_proposals: int = 2000
    box_batch_size_per_image: int = 512
    initializer_range: float = 0.01
    score_threshold: float = 0.05
    nms_threshold: float = 0.5

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmFasterRCNNConfig":
        """Return the configuration of a named size, "tiny" to "base", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def __post_init__(self, **kwargs):
        resolve_backbone(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        check_backbone(self)
        require_choice(self, "backbone_norm", NORMS)
        require_at_least(self, LEAST_1)
        require_at_least(self, ("backbone_frozen_stages",), 0)
        for name in ("backbone_norm_momentum", "nms_threshold"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0.0 <= self.score_threshold < 1.0:
            raise ValueError(f"score_threshold must be in [0, 1), got {self.score_threshold}")
