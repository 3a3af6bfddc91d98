"""Encoder and decoder of Deformable DETR (Zhu et al. 2021, arXiv:2010.04159, figure 2 and appendices A.2 to A.4).

    feature maps of all levels (B, N, D) -> encoder (B, N, D)
    queries (B, Q, D) + references + memory (B, N, D) -> decoder, output of every layer (B, L, Q, D)
    with refinement: layer -> box head -> box logits; the box, without gradient, is the next layer's reference

Shapes: B images; N cells of all feature maps; D = config.d_model; Q queries; L = config.decoder_layers; S =
config.num_feature_levels. Boxes are cxcywh, as shares of the unpadded image.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import ConfigView, MultiHeadAttention, wants_maps
from .backbones import reset
from .blocks import FeedForward, Residual
from .boxes import inverse_sigmoid
from .class_scoring import scoring_of
from .configuration_deformable_detr import TfmDeformableDetrConfig
from .deformable_attention import DeformableAttention, References, Sizes, reference_boxes, reference_points
from .detection import BoxHead, DetectorPreTrainedModel
from .positions import LearnedPositions2D

# Weight names of transformers' Deformable DETR: (name in the file, name in the model), applied in this order on
# loading.
NATIVE_NAMES = (
    (r"backbone\.conv_encoder\.model\.", "backbone.body."),
    (r"self_attn_layer_norm\.", "self_attn_residual.norm."),
    (r"encoder_attn_layer_norm\.", "cross_attn_residual.norm."),
    (r"encoder_attn\.(sampling_offsets|attention_weights|value_proj|output_proj)\.", r"cross_attn.\1."),
    (r"(layers\.\d+)\.fc1\.", r"\1.feed_forward.up_proj."),
    (r"(layers\.\d+)\.fc2\.", r"\1.feed_forward.down_proj."),
    (r"final_layer_norm\.", "feed_forward_residual.norm."),
)
# Initial probability of every class, so that the focal loss of many negatives is small (Lin et al. 2017,
# arXiv:1708.02002, section 4.1).
PRIOR = 0.01
FIRST_SIZE = -2.0  # initial logit of width and height: 0.12 of the image


class SizedBoxHead(BoxHead):
    """Box head whose boxes are at first as large as ``size_bias`` says, whatever the query.

    Args:
        hidden_size: D.
        size_bias: initial bias of width and height.
    """

    def __init__(self, hidden_size: int, size_bias: float):
        super().__init__(hidden_size)
        self.size_bias = size_bias


class DeformableEncoderBlock(GradientCheckpointingLayer):
    """Encoder block: deformable self-attention and feed-forward layer, post-norm."""

    def __init__(self, config: TfmDeformableDetrConfig):
        super().__init__()
        self.self_attn = DeformableAttention(
            config.d_model, config.encoder_attention_heads, config.num_feature_levels, config.encoder_n_points
        )
        self.self_attn_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def forward(
        self,
        hidden_states: Tensor,
        centre: Tensor,
        scale: Tensor,
        sizes: Sizes,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Apply the block: (B, N, D) -> (B, N, D); see `References` and `DeformableAttention.forward`."""
        references = References(centre, scale, sizes)

        def attend(states: Tensor) -> Tensor:
            return self.self_attn(states, states, references, attention_mask, positions)[0]

        hidden_states = self.self_attn_residual(hidden_states, attend)
        return self.feed_forward_residual(hidden_states, lambda states: self.feed_forward(states))


class DeformableDecoderBlock(GradientCheckpointingLayer):
    """Decoder block: self-attention of the queries, deformable cross-attention, feed-forward layer, post-norm."""

    def __init__(self, config: TfmDeformableDetrConfig, layer_idx: int):
        super().__init__()
        view = ConfigView(
            config, num_attention_heads=config.decoder_attention_heads, intermediate_size=config.decoder_ffn_dim
        )
        self.config = config
        self.self_attn = MultiHeadAttention(view, layer_idx=layer_idx)
        self.self_attn_residual = Residual(view)
        self.cross_attn = DeformableAttention(
            config.d_model, config.decoder_attention_heads, config.num_feature_levels, config.decoder_n_points
        )
        self.cross_attn_residual = Residual(view)
        self.feed_forward = FeedForward(view)
        self.feed_forward_residual = Residual(view)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        centre: Tensor,
        scale: Tensor,
        sizes: Sizes,
        memory_mask: Tensor | None = None,
        positions: Tensor | None = None,
        output_points: bool = False,
        **kwargs,
    ) -> Tensor:
        """Apply the block to queries (B, Q, D) and the encoder's output (B, N, D): -> (B, Q, D).

        With groups of queries, (B, G Q, D), self-attention sees one group at a time.

        Args:
            centre, scale, sizes: see `References`; tensors of their own, because reentrant checkpointing finds
                gradients only of arguments that are tensors.
            positions: (B, Q, D), added to the queries in both attentions, and to the keys of self-attention.
            output_points: see `DeformableAttention.forward`.
        """
        references = References(centre, scale, sizes)

        def attend(states: Tensor) -> Tensor:
            own, places = (by_group(part, self.config.num_queries) for part in (states, positions))
            return self.self_attn(own, query_positions=places, key_positions=places, **kwargs)[0].view_as(states)

        def sample(states: Tensor) -> Tensor:
            return self.cross_attn(states, memory, references, memory_mask, positions, output_points)[0]

        hidden_states = self.self_attn_residual(hidden_states, attend)
        hidden_states = self.cross_attn_residual(hidden_states, sample)
        return self.feed_forward_residual(hidden_states, lambda states: self.feed_forward(states))


def by_group(states: Tensor | None, num_queries: int) -> Tensor | None:
    """Turn groups of queries into rows of a batch: (B, G Q, D) -> (B G, Q, D); None and a single group stay."""
    if states is None or states.shape[1] == num_queries:
        return states
    return states.unflatten(1, (-1, num_queries)).flatten(0, 1)


class TfmDeformableDetrPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Deformable DETR models: weight initialisation."""

    config: TfmDeformableDetrConfig
    _input_embed_layer = "input_proj"  # creates the input tokens, like the patch embedding of a ViT
    _no_split_modules = ["TimmFeatures", "TransformersFeatures", "DeformableEncoderBlock", "DeformableDecoderBlock"]  # noqa: RUF012
    # For training a saved model further, see `TfmDetrPreTrainedModel`.
    classifier_modules: ClassVar = ("class_embed",)
    query_modules: ClassVar = ("query_position_embeddings", "group_query_embeddings")
    head_modules: ClassVar = (*classifier_modules, "bbox_embed")
    image_processor_name: ClassVar = "DeformableDetrImageProcessor"  # in transformers
    query_attention: ClassVar = "points"  # the decoder samples points; it has no maps over the image
    published_rates: ClassVar = (2e-4, 2e-5, 32)  # learning rate, of the backbone, images per step (authors' code)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the authors' code does: Transformer matrices by Xavier uniform, heads by torch's defaults with
        fixed biases, queries and levels from N(0, 1)."""
        if reset(module):
            return
        if isinstance(getattr(module, "prior", None), float):
            default_linear(module)
            init.constant_(module.bias, math.log(module.prior / (1 - module.prior)))
        elif isinstance(module, SizedBoxHead):  # its layers have been initialised before
            for layer in module.layers[:-1]:
                default_linear(layer)
            init.zeros_(module.layers[-1].weight)
            init.copy_(module.layers[-1].bias, torch.tensor([0.0, 0.0, module.size_bias, module.size_bias]))
        elif isinstance(module, DeformableAttention):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight, gain=self.config.init_xavier_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, LearnedPositions2D):
            init.uniform_(module.row_embeddings.weight)
            init.uniform_(module.column_embeddings.weight)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        if isinstance(getattr(module, "level_embed", None), nn.Parameter):
            init.normal_(module.level_embed)


def default_linear(layer: nn.Linear) -> None:
    """Initialise weight and bias as torch does: uniform, up to 1 / sqrt(inputs)."""
    bound = layer.in_features**-0.5
    init.uniform_(layer.weight, -bound, bound)
    init.uniform_(layer.bias, -bound, bound)


def class_heads(config: TfmDeformableDetrConfig) -> nn.ModuleList:
    """Create the class heads: one for all decoder layers or, with refinement, one each, and one of the proposals."""
    outputs = scoring_of(config).outputs(config.num_labels)
    heads = nn.ModuleList(nn.Linear(config.d_model, outputs) for _ in range(count_heads(config)))
    for head in heads:
        head.prior = PRIOR  # read by `_init_weights`; a class of its own would escape quantisation
    return heads


def box_heads(config: TfmDeformableDetrConfig) -> nn.ModuleList:
    """Create the box heads, as many as class heads. Only the first sets the initial size; others refine its boxes."""
    first = 0.0 if config.two_stage else FIRST_SIZE
    return nn.ModuleList(SizedBoxHead(config.d_model, 0.0 if i else first) for i in range(count_heads(config)))


def count_heads(config: TfmDeformableDetrConfig) -> int:
    """Return the number of heads, see `class_heads`."""
    return config.decoder_layers + config.two_stage if config.with_box_refine else 1


class TfmDeformableDetrEncoder(TfmDeformableDetrPreTrainedModel):
    """Deformable DETR encoder: feature maps of all levels (B, N, D) -> memory (B, N, D)."""

    _can_record_outputs = {"hidden_states": DeformableEncoderBlock, "attentions": DeformableAttention}  # noqa: RUF012

    def __init__(self, config: TfmDeformableDetrConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(DeformableEncoderBlock(config) for _ in range(config.encoder_layers))
        self.post_init()
        self._tp_plan, self._fsdp_plan = {}, {}  # the plans in the config use the module names of the whole model

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        references: References,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode cells (B, N, D) with a mask (B, N); ``positions`` are added to the queries in every layer."""
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, *references, attention_mask, positions)
        return BaseModelOutput(last_hidden_state=hidden_states)


@dataclass
class TfmDeformableDetrDecoderOutput(DeformableDetrDecoderOutput):
    """The output of transformers' decoder, and more.

    Args:
        intermediate_box_logits: (B, L, Q, 4), the logits of the boxes of every layer, with refinement.
        sampling_points: one tensor (B, Q, H, S, P, 2) per layer, the points of cross-attention, on request.
    """

    intermediate_box_logits: Tensor | None = None
    sampling_points: tuple[Tensor, ...] | None = None


class TfmDeformableDetrDecoder(TfmDeformableDetrPreTrainedModel):
    """Deformable DETR decoder: queries attend to each other and sample the memory (B, N, D) around references.

    With refinement it has the box heads, and in two stages the class heads, which its input depends on.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeformableDecoderBlock,
        "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(DeformableAttention, index=1, layer_name="cross_attn"),
        "sampling_points": OutputRecorder(DeformableAttention, index=2, layer_name="cross_attn"),
    }

    def __init__(self, config: TfmDeformableDetrConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(DeformableDecoderBlock(config, i) for i in range(config.decoder_layers))
        self.bbox_embed = box_heads(config) if config.with_box_refine else None
        self.class_embed = class_heads(config) if config.two_stage else None
        self.post_init()
        self._tp_plan, self._fsdp_plan = {}, {}  # the plans in the config use the module names of the whole model

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        encoder_hidden_states: Tensor,
        reference: Tensor,
        sizes: Sizes,
        ratios: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        output_sampling_points: bool = False,
        **kwargs,
    ) -> TfmDeformableDetrDecoderOutput:
        """Decode queries (B, Q, D) over the memory (B, N, D).

        Args:
            reference: (B, Q, 2) points or (B, Q, 4) boxes around which the first layer samples.
            sizes: h and w of every level.
            ratios: see `reference_points`.
            encoder_attention_mask: (B, N) bool.
            positions: position embeddings of the queries, (B, Q, D).

        Returns:
            ``last_hidden_state`` (B, Q, D), ``intermediate_hidden_states`` (B, L, Q, D) and
            ``intermediate_reference_points`` (B, L, Q, 2 or 4), the reference after each layer.
        """
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        hidden_states, states, references, box_logits = inputs_embeds, [], [], []
        for i, layer in enumerate(self.layers):
            if reference.shape[-1] == 4:
                around = reference_boxes(reference, ratios, sizes, self.config.decoder_n_points)
            else:
                around = reference_points(reference, ratios, sizes)
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                *around,
                encoder_attention_mask,
                positions,
                output_points=output_sampling_points,
                **kwargs,
            )
            if self.bbox_embed is not None:
                box_logits.append(refined(self.bbox_embed[i](hidden_states), reference))
                reference = box_logits[-1].sigmoid().detach()
            states.append(hidden_states)
            references.append(reference)
        return TfmDeformableDetrDecoderOutput(
            last_hidden_state=hidden_states,
            intermediate_hidden_states=torch.stack(states, dim=1),
            intermediate_reference_points=torch.stack(references, dim=1),
            intermediate_box_logits=torch.stack(box_logits, dim=1) if box_logits else None,
        )


def refined(change: Tensor, reference: Tensor) -> Tensor:
    """Add a change (..., 4) of box logits to the logits of a reference (..., 4), or of a centre (..., 2): (..., 4)."""
    base = inverse_sigmoid(reference)
    return change + (base if base.shape[-1] == 4 else nn.functional.pad(base, (0, 2)))
