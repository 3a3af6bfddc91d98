"""Faster R-CNN with a feature pyramid (Ren et al. 2015, arXiv:1506.01497; Lin et al. 2017, arXiv:1612.03144), a
baseline for detectors with object queries.

    pixels (B, C, H, W) -> backbone -> pyramid of 5 maps (B, D, h, w) -> proposals of each image -> classes and boxes
    -> non-maximum suppression -> detections in the form of queries: class logits (B, Q, C + 1), boxes (B, Q, 4)

The backbone is that of our other detectors; pyramid, proposal network, box head and losses are torchvision's.

Shapes: B images; H, W pixels; h, w cells of a feature map; D = config.d_model; Q detections, at most
config.num_queries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .backbones import reset
from .boxes import cxcywh_to_xyxy, detections_as_queries
from .configuration_faster_rcnn import TfmFasterRCNNConfig
from .detection import DetectorPreTrainedModel, Labels, WithBackbone
from .image_backbones import PYRAMID_LEVELS, build_backbone, build_pyramid
from .input_checks import refuse_unknown
from .patches import unpadded_sizes

MAPS = 4  # of the backbone that are read, if it has as many
POOL = "pool"  # torchvision's name of a last map, for proposals only
SHAPES = (0.5, 1.0, 2.0)  # height / width of the anchors
POOLED = 7  # cells of a side of a pooled box
EVALUATION_SEED = 0  # of the anchors and proposals that the loss samples in evaluation


@dataclass
class TfmFasterRCNNOutput(ModelOutput):
    """Output of Faster R-CNN: detections as transformers' DETR returns them, and with labels the losses."""

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    loss_sums: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None


class TfmFasterRCNNPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Faster R-CNN models: weight initialisation."""

    config: TfmFasterRCNNConfig
    config_class = TfmFasterRCNNConfig
    supports_gradient_checkpointing = False
    _no_split_modules = ["TimmFeatures"]  # noqa: RUF012
    _input_embed_layer = "backbone"  # reads the input
    classifier_modules: ClassVar = ("box_predictor",)
    query_modules: ClassVar = ()
    head_modules: ClassVar = ("box_predictor",)
    image_processor_name: ClassVar = "DetrImageProcessor"
    loss_terms: ClassVar = {
        "class": "loss_classifier",
        "box": "loss_box_reg",
        "objectness": "loss_objectness",
        "proposal": "loss_rpn_box_reg",
    }
    published_rates: ClassVar = None  # for AdamW; torchvision uses sgd with a rate of 0.02 and 16 images per step

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as torchvision does: the proposal network from a normal distribution, other layers uniformly."""
        if reset(module):
            return
        if isinstance(module, RPNHead):
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    init.normal_(part.weight, std=self.config.initializer_range)
                    init.zeros_(part.bias)
        elif isinstance(module, FeaturePyramidNetwork):
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    init.kaiming_uniform_(part.weight, a=1)
                    init.zeros_(part.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)


class TfmFasterRCNNModel(WithBackbone, TfmFasterRCNNPreTrainedModel):
    """Faster R-CNN without proposals and boxes: backbone and feature pyramid."""

    _auto_class = "AutoModel"

    def __init__(self, config: TfmFasterRCNNConfig):
        super().__init__(config)
        self.backbone = build_backbone(config, MAPS, MAPS)
        self.pyramid = build_pyramid(self.backbone, config.d_model, PYRAMID_LEVELS)
        channels = (self.pyramid or self.backbone).channels
        self.levels = tuple(map(str, range(len(channels))))  # torchvision's names of the maps
        self.fpn = FeaturePyramidNetwork(channels, config.d_model, LastLevelMaxPool())
        self.fpn.out_channels = config.d_model  # torchvision's FasterRCNN reads it
        self.post_init()

    @property
    def stride(self) -> int:
        """See `WithBackbone`."""
        return (self.pyramid or self.backbone).strides[0]

    @can_return_tuple
    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Compute the pyramid of images (B, C, H, W), with ``pixel_mask`` (B, H, W) if some images are padded.

        Returns:
            ``hidden_states``, maps (B, D, h, w), finest first; ``last_hidden_state``, the coarsest.
        """
        refuse_unknown(kwargs, self.config._attn_implementation)
        maps = self.fpn(dict(zip(self.levels, self.feature_maps(pixel_values, pixel_mask), strict=True)))
        return BaseModelOutput(last_hidden_state=maps[POOL], hidden_states=tuple(maps.values()))


class TfmFasterRCNNForObjectDetection(TfmFasterRCNNPreTrainedModel):
    """Faster R-CNN for object detection.

    The loss of an image is normalised by its own sampled anchors and proposals, and that of a step is the mean over
    its images, so that a step is the same however it is split. torchvision divides by the samples of all images of a
    batch, which is the same if every image has as many. Anchors and proposals are sampled at random.
    """

    _auto_class = "AutoModelForObjectDetection"
    _tp_plan = {"roi_heads.box_head.fc6": "colwise", "roi_heads.box_head.fc7": "rowwise"}  # noqa: RUF012

    def __init__(self, config: TfmFasterRCNNConfig):
        super().__init__(config)
        self.model = TfmFasterRCNNModel(config)
        anchors = tuple((config.anchor_size * 2**level,) for level in range(len(self.model.levels) + 1))
        parts = FasterRCNN(
            self.model.fpn,
            rpn_anchor_generator=AnchorGenerator(anchors, (SHAPES,) * len(anchors)),
            box_roi_pool=MultiScaleRoIAlign(self.model.levels, POOLED, sampling_ratio=2),
            box_head=TwoMLPHead(config.d_model * POOLED**2, config.representation_size),
            box_predictor=FastRCNNPredictor(config.representation_size, config.num_labels + 1),
            rpn_pre_nms_top_n_train=config.num_proposals,
            rpn_post_nms_top_n_train=config.num_proposals,
            rpn_pre_nms_top_n_test=(config.num_proposals + 1) // 2,
            rpn_post_nms_top_n_test=(config.num_proposals + 1) // 2,
            box_batch_size_per_image=config.box_batch_size_per_image,
            box_score_thresh=config.score_threshold,
            box_nms_thresh=config.nms_threshold,
        )
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads
        self.post_init()

    def count_items(self, labels: Labels, **batch: Any) -> dict[str, float]:
        """Return the ``num_items_in_batch`` of a batch, its number of images."""
        return dict.fromkeys(self.loss_terms.values(), float(len(labels)))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Labels | None = None,
        num_items_in_batch: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TfmFasterRCNNOutput:
        """Detect objects in images (B, C, H, W).

        Args:
            pixel_mask: (B, H, W), needed if some images are padded.
            labels: one dict per image with ``class_labels`` (n,) int64 and ``boxes`` (n, 4) cxcywh in [0, 1].
            num_items_in_batch: divisor of each summed loss term, see `count_items`; default: the images of this batch.

        Returns:
            In evaluation, or without labels, ``logits`` (B, Q, C + 1), whose softmax gives the scores, and
            ``pred_boxes`` (B, Q, 4) cxcywh in [0, 1]. With labels ``loss``, ``loss_dict``, the terms as means over
            images, and ``loss_sums``, their sums. In training without labels the sums are 0, and depend on all
            weights, as data-parallel training requires of a batch that counts for nothing.
        """
        self.roi_heads.detections_per_img = self.config.num_queries
        B, _, H, W = pixel_values.shape
        sizes = [(H, W)] * B
        if pixel_mask is not None:
            sizes = [(height, width) for height, width in unpadded_sizes(pixel_mask).tolist()]
        found = self.model(pixel_values, pixel_mask, **kwargs).hidden_states
        # torchvision decodes boxes in the precision of the maps; the spacing of bf16 at 128 pixels is one pixel.
        maps = {name: values.float() for name, values in zip((*self.model.levels, POOL), found, strict=True)}
        losses: dict[str, Any] = {}
        if labels is not None:
            sums = self.losses(pixel_values, sizes, maps, labels)
            counts = self.count_items(labels) if num_items_in_batch is None else num_items_in_batch
            means = {name: value / counts[name] for name, value in sums.items()}
            losses = {"loss": sum(means.values()), "loss_dict": means, "loss_sums": sums}
        elif self.training:
            none = pixel_values.new_zeros(0, 4)
            sums = self.losses(pixel_values, sizes, maps, [{"class_labels": none[:, 0].long(), "boxes": none}] * B)
            losses = {"loss_sums": {name: 0.0 * value for name, value in sums.items()}}
        if self.training and labels is not None:
            return TfmFasterRCNNOutput(**losses)
        with torch.no_grad(), self.mode(training=False):
            images = ImageList(pixel_values, sizes)
            proposals, _ = self.rpn(images, maps)
            detected, _ = self.roi_heads(maps, proposals, sizes)
        logits, boxes = detections_as_queries(detected, sizes, self.config.num_labels)
        return TfmFasterRCNNOutput(**losses, logits=logits, pred_boxes=boxes)

    def losses(
        self, pixel_values: Tensor, sizes: list[tuple[int, int]], maps: dict[str, Tensor], labels: Labels
    ) -> dict[str, Tensor]:
        """Return the sum of each loss term over images, computed one by one.

        Args:
            pixel_values: (B, C, H, W).
            sizes: height and width of each image without padding.
            maps: of the pyramid, (B, D, h, w).
            labels: see `forward`.
        """
        totals: dict[str, Tensor] = {}
        with self.mode(training=True):
            for i, (size, label) in enumerate(zip(sizes, labels, strict=True)):
                sides = pixel_values.new_tensor([size[1], size[0]] * 2, dtype=torch.float32)
                boxes = cxcywh_to_xyxy(label["boxes"].float()) * sides
                target = [{"boxes": boxes, "labels": label["class_labels"] + 1}]  # 0 is background
                own = {name: values[i : i + 1] for name, values in maps.items()}
                proposals, first = self.rpn(ImageList(pixel_values[i : i + 1], [size]), own, target)
                _, second = self.roi_heads(own, proposals, [size], target)
                for name, value in {**second, **first}.items():
                    totals[name] = totals.get(name, 0) + value.float()
        return totals

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Let torchvision's parts compute losses, or detect, in float32; their layers behave the same in both modes.

        In evaluation, losses sample the same anchors every time, and leave the state of the random generator alone.
        """
        parts = (self.rpn, self.roi_heads)
        before = [part.training for part in parts]
        apart = training and not self.training
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, apart), maybe_autocast(self.device.type, enabled=False):
            if apart:
                torch.manual_seed(EVALUATION_SEED)
            for part in parts:
                part.training = training
            try:
                yield
            finally:
                for part, mode in zip(parts, before, strict=True):
                    part.training = mode
