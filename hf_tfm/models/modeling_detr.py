"""DETR: object detection as set prediction, and panoptic segmentation (Carion et al. 2020, arXiv:2005.12872).

    pixels (B, C, H, W) -> backbone -> encoder -> memory (B, N, D)
    object queries (Q, D) -> decoder -> (L, B, Q, D) -> class logits (B, Q, C + 1), boxes (B, Q, 4)
    -> attention maps over the memory -> mask logits (B, Q, H / 4, W / 4)

Shapes: B images; H, W pixels; N cells of the last feature map; D = config.d_model; Q = config.num_queries;
L = config.decoder_layers; C = config.num_labels, where class C is "no object". Boxes are cxcywh, normalised by the
unpadded image size. A pixel mask is 1 for image and 0 for padding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.detr.modeling_detr import (
    DetrModelOutput,
    DetrObjectDetectionOutput,
    DetrSegmentationOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_detr import TfmDetrConfig
from .detection import BoxHead, CountsItems, Labels, WithBackbone, auxiliary, cell_mask, shared_outputs
from .detr_stacks import (
    NATIVE_NAMES,
    ImageFeatures,
    TfmDetrDecoder,
    TfmDetrEncoder,
    TfmDetrPreTrainedModel,
)
from .image_backbones import build_backbone
from .input_checks import refuse_unknown
from .linear import embedding_table
from .mask_head import BoxAttention, MaskHead
from .native_names import register_native_names
from .positions import LearnedPositions2D, sine_2d
from .set_loss import (
    Predictions,
    detection_losses,
    hungarian_match,
    mask_losses,
    matched_pairs,
    set_losses,
    target_masks,
    total_loss,
)


@dataclass
class TfmDetrObjectDetectionOutput(DetrObjectDetectionOutput):
    """The output of transformers' DETR, and with labels ``loss_sums``, see `total_loss`."""

    loss_sums: dict[str, Tensor] | None = None


@dataclass
class TfmDetrSegmentationOutput(DetrSegmentationOutput):
    """The output of transformers' DETR, and with labels ``loss_sums``, see `total_loss`."""

    loss_sums: dict[str, Tensor] | None = None


class PartOfPanoptic:
    """Mixin for a submodule of the panoptic model that also loads from a panoptic checkpoint.

    transformers' DETR leaves every weight random in that case (5.23).
    """

    part: ClassVar[str]  # name of this model as a submodule of the panoptic model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, *args, config=None, **kwargs):
        """Load as in transformers, from a checkpoint of this model or of the panoptic model."""
        source, given = pretrained_model_name_or_path, {} if config is None else {"config": config}
        if isinstance(config, PreTrainedConfig):
            saved = config.architectures
        else:
            saved = cls.config_class.get_config_dict(config or source, **kwargs)[0].get("architectures")
        if source is None or not {"TfmDetrForPanopticSegmentation", "DetrForSegmentation"} & set(saved or []):
            return super().from_pretrained(source, *args, **given, **kwargs)
        found = TfmDetrForPanopticSegmentation.from_pretrained(source, *args, **given, **kwargs)
        if isinstance(found, tuple):
            return found[0].get_submodule(cls.part), found[1]
        return found.get_submodule(cls.part)


class TfmDetrModel(WithBackbone, PartOfPanoptic, TfmDetrPreTrainedModel):
    """DETR without heads: backbone, encoder and decoder."""

    _auto_class = "AutoModel"
    part = "detr.model"

    def __init__(self, config: TfmDetrConfig):
        super().__init__(config)
        self.backbone = build_backbone(config, timm_maps=4, maps=1)  # the mask head reads four maps
        self.pyramid = None
        self.input_projection = nn.Conv2d(self.backbone.channels[-1], config.d_model, kernel_size=1)
        if config.position_embedding_type == "learned":
            self.position_embedding = LearnedPositions2D(config.d_model)
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        self.encoder = TfmDetrEncoder(config)
        self.decoder = TfmDetrDecoder(config)
        self.post_init()

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> ImageFeatures:
        """Compute the Transformer's inputs from images (B, C, H, W) and their mask (B, H, W).

        Raises:
            ValueError: see `feature_maps`.
        """
        maps = self.feature_maps(pixel_values, pixel_mask)
        projected = self.input_projection(maps[-1])
        mask = cell_mask(pixel_mask, maps[-1])
        if self.config.position_embedding_type == "learned":
            positions = self.position_embedding(mask)
        else:
            positions = sine_2d(mask, self.config.d_model)
        return ImageFeatures(
            maps, projected, positions.to(projected.dtype), None if pixel_mask is None else mask.flatten(1)
        )

    def transform(self, features: ImageFeatures, **kwargs) -> DetrModelOutput:
        """Run the encoder and decoder.

        Raises:
            TypeError: an argument is unknown.
        """
        refuse_unknown(kwargs, self.config._attn_implementation)
        encoded = self.encoder(
            features.projected.flatten(2).transpose(1, 2), features.mask, features.positions, **kwargs
        )
        memory = encoded.last_hidden_state
        queries = embedding_table(self.query_position_embeddings, self.config.num_queries, memory.device)
        queries = queries[None].to(memory.dtype)  # (1, Q, D)
        decoded = self.decoder(
            torch.zeros_like(queries).expand(memory.shape[0], -1, -1),
            memory,
            features.mask,
            positions=queries,
            memory_positions=features.positions,
            **kwargs,
        )
        return DetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
        )

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> DetrModelOutput:
        """Compute query states of images (B, C, H, W), with ``pixel_mask`` (B, H, W) if some images are padded.

        Returns:
            ``last_hidden_state`` (B, Q, D); with auxiliary losses ``intermediate_hidden_states`` (L, B, Q, D);
            ``encoder_last_hidden_state`` (B, N, D); on request hidden states and attentions.
        """
        return self.transform(self.features(pixel_values, pixel_mask), **kwargs)


class BoxPredictor(BoxHead):
    """Box head with sigmoid (section 3.2, "Prediction feed-forward networks")."""

    def forward(self, states: Tensor) -> Tensor:
        """Predict boxes from states: (..., D) -> (..., 4) cxcywh in (0, 1)."""
        return super().forward(states).sigmoid()


class TfmDetrForObjectDetection(CountsItems, PartOfPanoptic, TfmDetrPreTrainedModel):
    """DETR for object detection: class and box heads shared by all decoder layers."""

    _auto_class = "AutoModelForObjectDetection"
    part = "detr"

    def __init__(self, config: TfmDetrConfig):
        super().__init__(config)
        self.model = TfmDetrModel(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels + 1)
        self.bbox_predictor = BoxPredictor(config.d_model)
        self.post_init()

    def heads(self, outputs: DetrModelOutput) -> tuple[Tensor, Tensor]:
        """Return logits (L, B, Q, C + 1) and boxes (L, B, Q, 4); without auxiliary losses L = 1 (last layer)."""
        states = outputs.intermediate_hidden_states
        if states is None:
            states = outputs.last_hidden_state[None]
        # Quantised layers of bitsandbytes accept at most three dimensions.
        flat, sizes = states.flatten(0, 1), states.shape[:2]  # (L B, Q, D)
        return self.class_labels_classifier(flat).unflatten(0, sizes), self.bbox_predictor(flat).unflatten(0, sizes)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Labels | None = None,
        num_items_in_batch: dict[str, float] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TfmDetrObjectDetectionOutput:
        """Detect objects in images (B, C, H, W).

        Args:
            pixel_mask: (B, H, W), needed if some images are padded.
            labels: one dict per image with ``class_labels`` (n,) int64 and ``boxes`` (n, 4) cxcywh in [0, 1].
            num_items_in_batch: divisor of each summed loss term, see `count_items`; default: the counts of this batch.
                A training loop that splits a step into micro-batches or ranks passes the counts of the whole step.
                Trainer passes none.

        Returns:
            ``logits`` (B, Q, C + 1); ``pred_boxes`` (B, Q, 4); with labels ``loss``, ``loss_dict`` (terms of the last
            layer, and of the other layers with their index as a suffix), ``loss_sums``, see `total_loss`, and, with
            auxiliary losses, ``auxiliary_outputs``, the predictions of the other layers; on request hidden states and
            attentions.
        """
        outputs = self.model(pixel_values, pixel_mask, **kwargs)
        logits, boxes = self.heads(outputs)
        losses = {}
        if labels is not None:
            losses = detection_losses(Predictions(logits, boxes), labels, self.config, num_items_in_batch)
        return TfmDetrObjectDetectionOutput(
            **losses,
            logits=logits[-1],
            pred_boxes=boxes[-1],
            auxiliary_outputs=auxiliary(logits, boxes) if labels is not None else None,
            **shared_outputs(outputs, "intermediate_hidden_states"),
        )


class TfmDetrForPanopticSegmentation(CountsItems, TfmDetrPreTrainedModel):
    """DETR for panoptic segmentation: a mask for each query, for things and stuff alike (section 4.4).

    It loads checkpoints of `TfmDetrForObjectDetection`; call `freeze_detector` to train only the mask head, as in the
    paper.
    """

    _auto_class = "AutoModelForUniversalSegmentation"
    base_model_prefix = "detr"

    def __init__(self, config: TfmDetrConfig):
        super().__init__(config)
        if config.backbone_config is not None:
            raise ValueError(
                "the mask head reads four feature maps, as timm models have: backbone must be the name of one, got a "
                f"backbone of type {config.backbone_config['model_type']}"
            )
        heads = config.encoder_attention_heads
        if config.d_model % 16 or (config.d_model + heads) % 8:
            raise ValueError(
                f"the mask head needs a d_model that is a multiple of 16 and, with encoder_attention_heads added, of "
                f"8, got {config.d_model} and {heads}"
            )
        self.detr = TfmDetrForObjectDetection(config)
        channels = self.detr.model.backbone.channels[-2::-1]
        self.bbox_attention = BoxAttention(config.d_model, heads)
        self.mask_head = MaskHead(config.d_model, heads, channels, config.activation_function)
        self.post_init()

    def freeze_detector(self) -> None:
        """Freeze everything except the mask head."""
        self.detr.requires_grad_(False)
        self.train(self.training)  # puts frozen batch norms in eval mode

    def masks(self, features: ImageFeatures, outputs: DetrModelOutput, images: Tensor, queries: Tensor) -> Tensor:
        """Return mask logits (n, h, w) of n queries, given by image and query indices of shape (n,)."""
        size = features.projected.shape[2:]
        maps = self.bbox_attention(outputs.last_hidden_state, outputs.encoder_last_hidden_state, features.mask)
        return self.mask_head(
            features.projected, maps[images, queries].unflatten(-1, size), list(features.maps[:-1]), images
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Labels | None = None,
        num_items_in_batch: dict[str, float] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TfmDetrSegmentationOutput:
        """Detect and segment objects in images (B, C, H, W).

        The masks need the backbone's feature maps, which the outputs of ``detr`` and ``detr.model`` do not include.
        Their submodules are called one by one, so forward hooks on the submodules run, but not hooks on these two.

        Args:
            pixel_mask, num_items_in_batch: see `TfmDetrForObjectDetection.forward`.
            labels: as in `TfmDetrForObjectDetection.forward`, plus ``masks`` (n, H, W) of 0 and 1 for each image,
                unpadded or padded like the image.

        Returns:
            The outputs of `TfmDetrForObjectDetection.forward`, plus ``pred_masks`` (B, Q, H / 4, W / 4); None when
            training with labels, where only the masks needed by the loss are computed.
        """
        model = self.detr.model
        features = model.features(pixel_values, pixel_mask)
        outputs = model.transform(features, **kwargs)
        logits, boxes = self.detr.heads(outputs)
        B, Q = boxes.shape[1:3]
        pred_masks, losses = None, {}
        if labels is None or not self.training:
            images = torch.arange(B, device=boxes.device).repeat_interleave(Q)
            queries = torch.arange(Q, device=boxes.device).repeat(B)
            pred_masks = self.masks(features, outputs, images, queries).unflatten(0, (B, Q))
        if labels is not None:
            matching = hungarian_match(logits, boxes, labels, self.config)
            terms = set_losses(logits, boxes, matching, self.config)
            images, queries, objects = matched_pairs(matching, Q)
            found = self.masks(features, outputs, images, queries) if self.training else pred_masks[images, queries]
            targets = target_masks(labels, tuple(pixel_values.shape[2:]), matching.objects.counts, boxes.device)[
                objects
            ]
            terms |= mask_losses(found, targets)
            losses = total_loss(terms, matching, self.config, num_items_in_batch)
        return TfmDetrSegmentationOutput(
            **losses,
            logits=logits[-1],
            pred_boxes=boxes[-1],
            pred_masks=pred_masks,
            auxiliary_outputs=auxiliary(logits, boxes) if labels is not None else None,
            **shared_outputs(outputs, "intermediate_hidden_states"),
        )


register_native_names("TfmDetrModel", NATIVE_NAMES)
register_native_names(
    "TfmDetrForPanopticSegmentation",
    (
        (r"bbox_attention\.q_linear\.", "bbox_attention.q_proj."),
        (r"bbox_attention\.k_linear\.", "bbox_attention.k_proj."),
        (r"mask_head\.lay1\.", "mask_head.first.conv."),
        (r"mask_head\.gn1\.", "mask_head.first.norm."),
        (r"mask_head\.lay2\.", "mask_head.second.conv."),
        (r"mask_head\.gn2\.", "mask_head.second.norm."),
        (r"mask_head\.adapter1\.", "mask_head.steps.0.adapter."),
        (r"mask_head\.lay3\.", "mask_head.steps.0.refine.conv."),
        (r"mask_head\.gn3\.", "mask_head.steps.0.refine.norm."),
        (r"mask_head\.adapter2\.", "mask_head.steps.1.adapter."),
        (r"mask_head\.lay4\.", "mask_head.steps.1.refine.conv."),
        (r"mask_head\.gn4\.", "mask_head.steps.1.refine.norm."),
        (r"mask_head\.adapter3\.", "mask_head.steps.2.adapter."),
        (r"mask_head\.lay5\.", "mask_head.steps.2.refine.conv."),
        (r"mask_head\.gn5\.", "mask_head.steps.2.refine.norm."),
        (r"mask_head\.out_lay\.", "mask_head.last."),
    ),
)
