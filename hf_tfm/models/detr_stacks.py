"""Encoder and decoder of DETR (Carion et al. 2020, arXiv:2005.12872, figures 2 and 10).

    pixels (B, C, H, W) -> feature maps -> 1 x 1 projection (B, D, h, w) -> encoder (B, N, D)
    object queries (Q, D) + memory (B, N, D) -> decoder, output of every layer (L, B, Q, D)

Shapes: B images; H, W pixels; h, w cells of the last feature map, N = h w in row-major order; D = config.d_model;
Q = config.num_queries; L = config.decoder_layers. A pixel mask is 1 for image and 0 for padding.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.detr.modeling_detr import DetrDecoderOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import ConfigView, MultiHeadAttention, eager_view, padding_mask, wants_maps
from .attention_method import AttentionWeights
from .backbones import reset
from .blocks import DecoderBlock, EncoderBlock
from .configuration_detr import TfmDetrConfig
from .detection import DetectorPreTrainedModel
from .positions import LearnedPositions2D

# Weight names of transformers' DETR and of earlier versions of this package: (name in the file, name in the model),
# applied in this order on loading.
NATIVE_NAMES = (
    (r"backbone\.conv_encoder\.model\.", "backbone.body."),
    (r"self_attn_layer_norm\.", "self_attn_residual.norm."),
    (r"encoder_attn_layer_norm\.", "cross_attn_residual.norm."),
    (r"encoder_attn\.(q|k|v|out)_proj\.", r"cross_attn.\1_proj."),
    (r"(layers\.\d+)\.fc1\.", r"\1.feed_forward.up_proj."),
    (r"(layers\.\d+)\.fc2\.", r"\1.feed_forward.down_proj."),
    (r"final_layer_norm\.", "feed_forward_residual.norm."),
)


class ImageFeatures(NamedTuple):
    """Image features read by the Transformer.

    Args:
        maps: feature maps of the backbone (B, F, h', w'), largest first.
        projected: projection of the last feature map: (B, D, h, w).
        positions: position embeddings of its cells: (B, N, D), or (1, N, D) without padding.
        mask: mask of its cells: (B, N) bool, True = image; None without padding.
    """

    maps: list[Tensor]
    projected: Tensor
    positions: Tensor
    mask: Tensor | None


class TfmDetrPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the DETR models: weight initialisation."""

    config: TfmDetrConfig
    _input_embed_layer = "input_projection"  # creates the input tokens, like the patch embedding of a ViT
    _no_split_modules = ["TimmFeatures", "TransformersFeatures", "EncoderBlock", "DecoderBlock"]  # noqa: RUF012
    # For training a saved model further: modules whose size is the number of classes, or of queries, and modules that
    # a file may lack as a whole.
    classifier_modules: ClassVar = ("class_labels_classifier",)
    query_modules: ClassVar = ("query_position_embeddings",)
    head_modules: ClassVar = (*classifier_modules, "bbox_predictor", "mask_head", "bbox_attention")
    image_processor_name: ClassVar = "DetrImageProcessor"  # in transformers
    query_attention: ClassVar = "maps"  # of the decoder's cross-attention, for pictures
    published_rates: ClassVar = (1e-4, 1e-5, 64)  # learning rate, of the backbone, images per step (section 4)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise Transformer matrices by Xavier uniform, as the authors do, and object queries from N(0, 1)."""
        if reset(module):
            return
        if isinstance(module, AttentionWeights):
            module.initialize()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=self.config.init_xavier_std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=1)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, LearnedPositions2D):
            init.uniform_(module.row_embeddings.weight)
            init.uniform_(module.column_embeddings.weight)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class TfmDetrEncoder(TfmDetrPreTrainedModel):
    """DETR encoder (figure 10, left): cells of the feature map (B, N, D) -> memory (B, N, D)."""

    _can_record_outputs = {"hidden_states": EncoderBlock, "attentions": MultiHeadAttention}  # noqa: RUF012

    def __init__(self, config: TfmDetrConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(EncoderBlock(config, i) for i in range(config.encoder_layers))
        # The output of pre-norm blocks is not normalised yet; that of post-norm blocks is.
        self.layernorm = nn.LayerNorm(config.d_model, config.layer_norm_eps) if config.norm_first else nn.Identity()
        self.post_init()
        self._tp_plan, self._fsdp_plan = {}, {}  # the plans in the config use the module names of the whole model

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """Encode cells (B, N, D) with a mask (B, N); ``positions`` are added in every attention layer."""
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        config = eager_view(self.config) if kwargs["output_attentions"] else self.config
        mask = padding_mask(config, inputs_embeds, attention_mask)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, positions=positions, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden_states))


class TfmDetrDecoder(TfmDetrPreTrainedModel):
    """DETR decoder (figure 10, right): object queries attend to each other and to the memory (B, N, D)."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DecoderBlock,
        "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: TfmDetrConfig):
        super().__init__(config)
        view = ConfigView(
            config, num_attention_heads=config.decoder_attention_heads, intermediate_size=config.decoder_ffn_dim
        )
        self.layers = nn.ModuleList(DecoderBlock(view, i, is_causal=False) for i in range(config.decoder_layers))
        self.layernorm = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.post_init()
        self._tp_plan, self._fsdp_plan = {}, {}  # the plans in the config use the module names of the whole model

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        **kwargs,
    ) -> DetrDecoderOutput:
        """Decode queries (B, Q, D) over the memory (B, N, D).

        Args:
            encoder_attention_mask: (B, N).
            positions: position embeddings of the queries, (1, Q, D): the learned object queries.
            memory_positions: position embeddings of the memory.

        Returns:
            ``last_hidden_state`` (B, Q, D), the last layer's output after the final norm; with auxiliary losses
            ``intermediate_hidden_states`` (L, B, Q, D), the same for every layer.
        """
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        config = eager_view(self.config) if kwargs["output_attentions"] else self.config
        memory_mask = padding_mask(config, inputs_embeds, encoder_attention_mask, encoder_hidden_states)
        hidden_states, outputs = inputs_embeds, []
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                memory_mask=memory_mask,
                positions=positions,
                memory_positions=memory_positions,
                **kwargs,
            )
            outputs.append(hidden_states)
        if not self.config.auxiliary_loss:
            return DetrDecoderOutput(last_hidden_state=self.layernorm(hidden_states))
        # With auxiliary losses transformers' DETR feeds the normalised states to the next layer (5.23); the paper and
        # the authors' code do not.
        intermediate = self.layernorm(torch.stack(outputs))
        return DetrDecoderOutput(last_hidden_state=intermediate[-1], intermediate_hidden_states=intermediate)
