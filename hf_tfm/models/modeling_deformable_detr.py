"""Deformable DETR: object detection with attention to few sampled points (Zhu et al. 2021, arXiv:2010.04159).

    pixels (B, C, H, W) -> backbone, projections -> feature maps of S levels (B, N, D) -> encoder -> memory (B, N, D)
    object queries (Q, 2 D), or the best proposals of the memory -> decoder -> (B, L, Q, D)
    -> class logits (B, Q, C) without a class for "no object", boxes (B, Q, 4)

Shapes: B images; H, W pixels; h, w cells of a feature map; N cells of all S = config.num_feature_levels maps, one map
after the other; D = config.d_model; Q = config.num_queries; G = config.query_groups, and Q stands for G Q in the
outputs of the base model in training; L = config.decoder_layers; C = config.num_labels. Boxes
are cxcywh, as shares of the unpadded image size. A pixel mask is 1 for image and 0 for padding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrModelOutput,
    DeformableDetrObjectDetectionOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_deformable_detr import BACKBONE_LEVELS, GROUPS, TfmDeformableDetrConfig
from .deformable_attention import Sizes, precise, reference_points
from .deformable_detr_stacks import (
    NATIVE_NAMES,
    TfmDeformableDetrDecoder,
    TfmDeformableDetrEncoder,
    TfmDeformableDetrPreTrainedModel,
    box_heads,
    class_heads,
    refined,
)
from .detection import CountsItems, Labels, WithBackbone, auxiliary, cell_mask, shared_outputs
from .image_backbones import build_backbone, build_pyramid
from .input_checks import refuse_unknown
from .linear import embedding_table
from .native_names import register_native_names
from .positions import LearnedPositions2D, sine_2d, sine_of_shares
from .set_loss import Predictions, detection_losses

CENTRES = -0.5  # positions of cells are those of their centres
PROPOSAL_SIDE = 0.05  # side of the boxes around the cells of the first level; it doubles with each level
MARGIN = 0.01  # cells make no proposal if a centre or side of their box is closer to 0 or 1


@dataclass
class TfmDeformableDetrModelOutput(DeformableDetrModelOutput):
    """The output of transformers' Deformable DETR, and more.

    Args:
        intermediate_box_logits: (B, L, Q, 4), logits of the boxes of every decoder layer, with refinement.
        sampling_points: one tensor (B, Q, heads, S, points, 2) per decoder layer, with ``output_sampling_points``:
            x and y of the points that a query samples, as shares of the padded image.
    """

    intermediate_box_logits: Tensor | None = None
    sampling_points: tuple[Tensor, ...] | None = None


@dataclass
class TfmDeformableDetrObjectDetectionOutput(DeformableDetrObjectDetectionOutput):
    """The output of transformers' Deformable DETR, with labels ``loss_sums``, see `total_loss`, and on request
    ``sampling_points``, see `TfmDeformableDetrModelOutput`."""

    loss_sums: dict[str, Tensor] | None = None
    sampling_points: tuple[Tensor, ...] | None = None


class ImageFeatures(NamedTuple):
    """Image features read by the Transformer.

    Args:
        cells: projected feature maps of all levels (B, N, D).
        positions: position embeddings of the cells: (B, N, D), or (1, N, D) without padding.
        points: centres of the cells as shares of the unpadded image, (B, N, 2), or (1, N, 2) without padding.
        sizes: h and w of every level.
        mask: (B, N) bool, True = image; None without padding.
        ratios: (B, S, 2), unpadded width and height of each level as shares of the padded ones; None without padding.
    """

    cells: Tensor
    positions: Tensor
    points: Tensor
    sizes: Sizes
    mask: Tensor | None
    ratios: Tensor | None


class Proposals(NamedTuple):
    """Proposals of the encoder, one per cell.

    Args:
        logits: (B, N, C).
        box_logits: (B, N, 4); infinite for cells that make no proposal.
    """

    logits: Tensor
    box_logits: Tensor


class LevelNorm(nn.GroupNorm):
    """Group norm that also accepts one image whose map is a single cell, for which torch's raises an error."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        return torch.group_norm(features, self.num_groups, self.weight, self.bias, self.eps)


class TfmDeformableDetrModel(WithBackbone, TfmDeformableDetrPreTrainedModel):
    """Deformable DETR without heads, except those that its own input depends on: backbone, encoder and decoder."""

    _auto_class = "AutoModel"

    def __init__(self, config: TfmDeformableDetrConfig):
        super().__init__(config)
        maps = min(config.num_feature_levels, BACKBONE_LEVELS)
        self.backbone = build_backbone(config, maps, maps)
        self.pyramid = build_pyramid(self.backbone, config.d_model, maps)
        inputs, D = (self.pyramid or self.backbone).channels, config.d_model
        layers = [nn.Conv2d(channels, D, kernel_size=1) for channels in inputs]
        for level in range(maps, config.num_feature_levels):
            channels = inputs[-1] if level == maps else D
            layers.append(nn.Conv2d(channels, D, kernel_size=3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(nn.Sequential(layer, LevelNorm(GROUPS, D)) for layer in layers)
        self.level_embed = nn.Parameter(torch.zeros(config.num_feature_levels, D))
        if config.position_embedding_type == "learned":
            self.position_embedding = LearnedPositions2D(D)
        self.encoder = TfmDeformableDetrEncoder(config)
        self.decoder = TfmDeformableDetrDecoder(config)
        if config.two_stage:
            self.enc_output = nn.Linear(D, D)
            self.enc_output_norm = nn.LayerNorm(D, config.layer_norm_eps)
            self.pos_trans = nn.Linear(2 * D, 2 * D)
            self.pos_trans_norm = nn.LayerNorm(2 * D, config.layer_norm_eps)
        else:
            self.query_position_embeddings = nn.Embedding(config.num_queries, 2 * D)
            if config.query_groups > 1:
                self.group_query_embeddings = nn.Embedding((config.query_groups - 1) * config.num_queries, 2 * D)
            self.reference_points = nn.Linear(D, 2)
        self.post_init()

    @property
    def stride(self) -> int:
        """See `WithBackbone`."""
        return (self.pyramid or self.backbone).strides[0]

    def levels(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> list[Tensor]:
        """Compute the projected feature maps of all levels, the largest first: (B, D, h, w) each."""
        maps = self.feature_maps(pixel_values, pixel_mask)
        projected = [layer(states) for layer, states in zip(self.input_proj, maps, strict=False)]
        source = maps[-1]  # the first further level reads the backbone's map, not its projection
        for layer in self.input_proj[len(maps) :]:
            source = layer(source)
            projected.append(source)
        return projected

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> ImageFeatures:
        """Compute the Transformer's inputs from images (B, C, H, W) and their mask (B, H, W).

        Raises:
            ValueError: see `feature_maps`.
        """
        projected = self.levels(pixel_values, pixel_mask)
        masks = [cell_mask(pixel_mask, states) for states in projected]
        ratios = torch.stack([valid_ratios(mask) for mask in masks], dim=1)  # (1 or B, S, 2)
        positions, points = [], []
        for level, mask in enumerate(masks):
            if self.config.position_embedding_type == "learned":
                cell_positions = self.position_embedding(mask)
            else:
                cell_positions = sine_2d(mask, self.config.d_model, CENTRES)
            positions.append(cell_positions + self.level_embed[level])
            points.append(cell_centres(mask) / ratios[:, None, level])
        cells = torch.cat([states.flatten(2).transpose(1, 2) for states in projected], dim=1)
        return ImageFeatures(
            cells,
            torch.cat(positions, dim=1).to(cells.dtype),
            torch.cat(points, dim=1),
            tuple((states.shape[2], states.shape[3]) for states in projected),
            None if pixel_mask is None else torch.cat([mask.flatten(1) for mask in masks], dim=1),
            None if pixel_mask is None else ratios,
        )

    def propose(self, memory: Tensor, features: ImageFeatures) -> Proposals:
        """Predict a class and a box at every cell of the memory (B, N, D) (appendix A.4)."""
        base = torch.cat([features.points, proposal_sides(features)], dim=-1)  # (1 or B, N, 4)
        good = ((base > MARGIN) & (base < 1.0 - MARGIN)).all(-1, keepdim=True)
        if features.mask is not None:
            good = good & features.mask[..., None]
        base = (base / (1.0 - base)).log().masked_fill(~good, torch.inf)
        states = self.enc_output_norm(self.enc_output(memory.masked_fill(~good, 0.0)))
        return Proposals(self.decoder.class_embed[-1](states), precise(self.decoder.bbox_embed[-1](states)) + base)

    def query_table(self, device: torch.device) -> Tensor:
        """Return the embeddings of the queries, (Q, 2 D), in training of all groups, (G Q, 2 D)."""
        Q, groups = self.config.num_queries, self.config.query_groups
        table = embedding_table(self.query_position_embeddings, Q, device)
        if self.training and groups > 1:
            return torch.cat([table, embedding_table(self.group_query_embeddings, (groups - 1) * Q, device)])
        return table

    def queries(self, proposals: Proposals | None, features: ImageFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoder's inputs: states and position embeddings (B, Q, D), references (B, Q, 2 or 4).

        Raises:
            ValueError: there are fewer cells than proposals to choose.
        """
        count, (B, N, D) = self.config.num_queries, features.cells.shape
        if proposals is None:
            table = self.query_table(features.cells.device)[None]
            positions, states = table.split(D, dim=2)  # (1, Q, D)
            with maybe_autocast(table.device.type, enabled=False):
                reference = precise(self.reference_points(positions)).sigmoid()
            states, positions = states.to(features.cells.dtype), positions.to(features.cells.dtype)
            return tuple(part.expand(B, -1, -1) for part in (states, positions, reference))
        if not torch.compiler.is_compiling() and count > N:
            raise ValueError(
                f"num_queries must be at most {N}, the number of cells of images of this size, with two_stage, got "
                f"{count}"
            )
        best = proposals.logits[..., 0].topk(count, dim=1).indices[..., None]  # (B, Q, 1)
        reference = proposals.box_logits.detach().gather(1, best.expand(-1, -1, 4)).sigmoid()
        embedded = sine_of_shares(reference, D // 2).flatten(2).to(features.cells.dtype)  # (B, Q, 2 D)
        positions, states = self.pos_trans_norm(self.pos_trans(embedded)).split(D, dim=2)
        return states, positions, reference

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_sampling_points: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TfmDeformableDetrModelOutput:
        """Compute query states of images (B, C, H, W), with ``pixel_mask`` (B, H, W) if some images are padded.

        Args:
            output_sampling_points: return the points of the decoder's cross-attention.

        Returns:
            ``last_hidden_state`` (B, Q, D); ``intermediate_hidden_states`` (B, L, Q, D); ``init_reference_points`` and
            ``intermediate_reference_points``, references before the first and after every layer (B, Q, 2 or 4) and
            (B, L, Q, 2 or 4); with refinement ``intermediate_box_logits`` (B, L, Q, 4); in two stages
            ``enc_outputs_class`` (B, N, C) and ``enc_outputs_coord_logits`` (B, N, 4) of the proposals;
            ``encoder_last_hidden_state`` (B, N, D); on request hidden states, attentions and ``sampling_points``.
            Deformable attentions are (B, queries, heads, S, points) instead of maps over all cells.

        Raises:
            TypeError: an argument is unknown.
            ValueError: see `features` and `queries`.
        """
        refuse_unknown(kwargs, self.config._attn_implementation)
        features = self.features(pixel_values, pixel_mask)
        references = reference_points(features.points, features.ratios, features.sizes)
        encoded = self.encoder(features.cells, references, features.mask, features.positions, **kwargs)
        memory = encoded.last_hidden_state
        proposals = self.propose(memory, features) if self.config.two_stage else None
        states, positions, reference = self.queries(proposals, features)
        decoded = self.decoder(
            states,
            memory,
            reference,
            features.sizes,
            features.ratios,
            features.mask,
            positions,
            output_sampling_points=output_sampling_points,
            **kwargs,
        )
        return TfmDeformableDetrModelOutput(
            init_reference_points=reference,
            last_hidden_state=decoded.last_hidden_state,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            intermediate_reference_points=decoded.intermediate_reference_points,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            enc_outputs_class=proposals.logits if proposals else None,
            enc_outputs_coord_logits=proposals.box_logits if proposals else None,
            intermediate_box_logits=decoded.intermediate_box_logits,
            sampling_points=decoded.sampling_points,
        )


class TfmDeformableDetrForObjectDetection(CountsItems, TfmDeformableDetrPreTrainedModel):
    """Deformable DETR for object detection: class and box heads of all decoder layers.

    Heads that the base model has (box heads with refinement, class heads in two stages) are not repeated here.
    """

    _auto_class = "AutoModelForObjectDetection"

    def __init__(self, config: TfmDeformableDetrConfig):
        super().__init__(config)
        self.model = TfmDeformableDetrModel(config)
        if not config.two_stage:
            self.class_embed = class_heads(config)
        if not config.with_box_refine:
            self.bbox_embed = box_heads(config)
        self.post_init()

    def heads(self, outputs: TfmDeformableDetrModelOutput) -> tuple[Tensor, Tensor]:
        """Return logits (L, B, Q, C) and boxes (L, B, Q, 4); without auxiliary losses L = 1 (last layer)."""
        config = self.config
        layers = range(config.decoder_layers) if config.auxiliary_loss else [config.decoder_layers - 1]
        states = outputs.intermediate_hidden_states.unbind(1)
        class_embed = self.model.decoder.class_embed if config.two_stage else self.class_embed
        if config.with_box_refine:
            logits = torch.stack([class_embed[i](states[i]) for i in layers])
            every = outputs.intermediate_box_logits.unbind(1)
            return logits, torch.stack([every[i] for i in layers]).sigmoid()
        flat = torch.cat([states[i] for i in layers])  # (L B, Q, D): one product for all layers
        logits = class_embed[0](flat).unflatten(0, (len(layers), -1))
        changes = self.bbox_embed[0](flat).unflatten(0, (len(layers), -1))
        return logits, refined(precise(changes), outputs.init_reference_points).sigmoid()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Labels | None = None,
        num_items_in_batch: dict[str, float] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TfmDeformableDetrObjectDetectionOutput:
        """Detect objects in images (B, C, H, W).

        Args:
            pixel_mask: (B, H, W), needed if some images are padded.
            labels: one dict per image with ``class_labels`` (n,) int64 and ``boxes`` (n, 4) cxcywh in [0, 1].
            num_items_in_batch: divisor of each summed loss term, see `count_items`; default: the counts of this batch.
                A training loop that splits a step into micro-batches or ranks passes the counts of the whole step.
                Trainer passes none.

        Returns:
            ``logits`` (B, Q, C); ``pred_boxes`` (B, Q, 4); with labels ``loss``, ``loss_dict`` (terms of the last
            layer, of the other layers with their index as a suffix, and of the proposals with the suffix "_enc"),
            ``loss_sums``, see `total_loss`, and, with auxiliary losses, ``auxiliary_outputs``, the predictions of the
            other layers; and the outputs of `TfmDeformableDetrModel.forward`.

        Raises:
            ValueError: a prediction is not finite, see `require_predictions`; labels do not fit.
        """
        outputs = self.model(pixel_values, pixel_mask, **kwargs)
        predictions = grouped(*self.heads(outputs), self.config.num_queries)
        layers = len(predictions.logits) // predictions.groups
        logits, boxes = predictions.logits[:layers], predictions.boxes[:layers]  # of the first group
        losses = {}
        if labels is not None:
            proposals = None
            if self.config.two_stage:
                found = outputs.enc_outputs_class[None], outputs.enc_outputs_coord_logits[None].sigmoid()
                proposals = Predictions(*found, one_class=True)
            losses = detection_losses(predictions, labels, self.config, num_items_in_batch, proposals)
        return TfmDeformableDetrObjectDetectionOutput(
            **losses,
            logits=logits[-1],
            pred_boxes=boxes[-1],
            auxiliary_outputs=auxiliary(logits, boxes) if labels is not None else None,
            **shared_outputs(outputs, "intermediate_box_logits"),
        )


def grouped(logits: Tensor, boxes: Tensor, num_queries: int) -> Predictions:
    """Split predictions (L, B, G Q, ...) of all groups of queries into layers of each group: (G L, B, Q, ...)."""
    groups = boxes.shape[2] // num_queries
    parts = (states.unflatten(2, (groups, num_queries)).movedim(2, 0).flatten(0, 1) for states in (logits, boxes))
    return Predictions(*parts, groups=groups)


def valid_ratios(mask: Tensor) -> Tensor:
    """Return the unpadded width and height of a feature map as shares of the padded ones: (B, h, w) -> (B, 2)."""
    rows, columns = mask.shape[1:]
    return torch.stack([mask[:, 0].sum(1) / columns, mask[:, :, 0].sum(1) / rows], dim=-1)


def cell_centres(mask: Tensor) -> Tensor:
    """Return the centres of the cells of a feature map as shares of its padded size: (B, h, w) -> (1, h w, 2)."""
    rows, columns = mask.shape[1:]
    y = (torch.arange(rows, device=mask.device) + 0.5) / rows
    x = (torch.arange(columns, device=mask.device) + 0.5) / columns
    return torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1)[None]


def proposal_sides(features: ImageFeatures) -> Tensor:
    """Return width and height of the box around each cell, equal for all cells of a level: (1 or B, N, 2)."""
    sides = [
        features.points.new_full((1, h * w, 2), PROPOSAL_SIDE * 2.0**level)
        for level, (h, w) in enumerate(features.sizes)
    ]
    return torch.cat(sides, dim=1).expand(features.points.shape[0], -1, -1)


register_native_names("TfmDeformableDetrModel", NATIVE_NAMES)
