"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929, figure 1).

    pixels (B, C, H, W) -> patches (B, N, D) + positions -> [class] + N tokens -> pre-norm blocks -> (B, 1 + N, D)
    -> class token or mean of patches (B, D) -> logits (B, labels)

With DeiT's distillation token (Touvron et al. 2021, arXiv:2012.12877, section 4) the tokens are [class] +
[distillation] + N.

Shapes: B images; C channels; H, W pixels; N patches in row-major order; D = config.hidden_size; A heads; S prefix
tokens before the patches: 1, or 2 with a distillation token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import MultiHeadAttention, eager_view, padding_mask, wants_maps
from .attention_method import AttentionWeights
from .backbones import reset
from .blocks import EncoderBlock
from .configuration_vit import TfmViTConfig
from .image_embeddings import TfmViTEmbeddings
from .input_checks import refuse_unknown
from .losses import sequence_loss
from .native_names import OwnNamesPreTrainedModel, register_native_names
from .patches import Size, patch_grid, patch_mask, unpadded_grid

# Weight names of transformers' ViT and of earlier versions of this package: (name in the file, name in the model),
# applied in this order on loading. Each pattern is anchored to a block, so that modules added by a subclass keep their
# names.
NATIVE_NAMES = (
    (r"encoder\.layer\.", "layers."),
    (r"(?<=\d\.)attention\.attention\.query\.", "self_attn.q_proj."),
    (r"(?<=\d\.)attention\.attention\.key\.", "self_attn.k_proj."),
    (r"(?<=\d\.)attention\.attention\.value\.", "self_attn.v_proj."),
    (r"(?<=\d\.)attention\.output\.dense\.", "self_attn.out_proj."),
    (r"(?<=\d\.)intermediate\.dense\.", "feed_forward.up_proj."),
    (r"(layers?\.\d+)\.output\.dense\.", r"\1.feed_forward.down_proj."),
    (r"(?<=\d\.)layernorm_before\.", "self_attn_residual.norm."),
    (r"(?<=\d\.)layernorm_after\.", "feed_forward_residual.norm."),
)


def drop_path_rates(config: TfmViTConfig) -> list[float]:
    """Return the drop-path rate of each block, rising linearly from 0 to ``drop_path_rate``."""
    last = max(config.num_hidden_layers - 1, 1)
    return [config.drop_path_rate * i / last for i in range(config.num_hidden_layers)]


def encoder_blocks(config: TfmViTConfig) -> nn.ModuleList:
    """Build the L encoder blocks (equations 2 and 3)."""
    return nn.ModuleList(EncoderBlock(config, i, rate) for i, rate in enumerate(drop_path_rates(config)))


class TfmViTPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the ViT models: weight initialisation, loading and saving."""

    config: TfmViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TfmViTEmbeddings", "EncoderBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderBlock, "attentions": MultiHeadAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights from a truncated normal of ``initializer_range``, as DeiT does, and biases to zero."""
        std = self.config.initializer_range
        if reset(module):
            return
        if isinstance(module, AttentionWeights):
            module.initialize()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TfmViTModel) and module.distillation_token is not None:
            init.trunc_normal_(module.distillation_token, std=std)
        elif isinstance(module, TfmViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            if module.kind == "learned":
                init.trunc_normal_(module.position_embeddings, std=std)
            elif module.kind == "sincos_2d":
                init.copy_(module.position_embeddings, module.fixed_positions())
            else:
                init.trunc_normal_(module.row_embeddings, std=std)
                init.trunc_normal_(module.column_embeddings, std=std)


class TfmViTPooler(nn.Module):
    """Representation layer: a linear layer followed by an activation (section 3.1)."""

    def __init__(self, config: TfmViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, pooler_output_size)."""
        return self.activation(self.dense(features))


class TfmViTModel(TfmViTPreTrainedModel):
    """ViT encoder without a classifier.

    Args:
        add_pooling_layer: apply the representation layer to the pooled features.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: TfmViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = TfmViTEmbeddings(config)
        # Has no separate position embedding: DeiT learns one, but only its sum with the token is ever used.
        token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.distillation_token else None
        self.distillation_token = token
        self.num_prefix_tokens = 1 if token is None else 2
        self.layers = encoder_blocks(config)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # With mean pooling the norm is applied after pooling, not before (MAE fine-tuning; He et al. 2021, app. A.1).
        self.layernorm = norm if config.pooling == "cls" else nn.Identity()
        self.fc_norm = norm if config.pooling == "mean" else None
        self.pooler = TfmViTPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def set_image_size(self, image_size: Size) -> None:
        """Adapt the model to images of another size in pixels, for fine-tuning, by resizing the position embeddings.

        Raises:
            ValueError: the image size is not divisible by the patch size.
        """
        self.embeddings.set_image_size(image_size)
        self.config.image_size = image_size

    def pool(self, hidden_states: Tensor) -> Tensor:
        """Pool to one vector per image: (B, S + N, D) -> (B, D), or (B, pooler_output_size) with a pooler."""
        features = hidden_states[:, 0] if self.fc_norm is None else self.fc_norm(hidden_states[:, 1:].mean(dim=1))
        return features if self.pooler is None else self.pooler(features)

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of rows and columns of patches in an image of this size in pixels.

        Raises:
            ValueError: the size is not divisible by the patch size.
        """
        if self.embeddings.backbone is not None:
            height, width = self.embeddings.backbone.grid(height, width)
        return patch_grid(height, width, self.config.patch_size)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = None,
        pixel_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images (B, C, H, W) of any height and width divisible by the patch size.

        Args:
            interpolate_pos_encoding: see `TfmViTEmbeddings.forward`.
            pixel_mask: (B, H, W), 1 for image and 0 for padding at the bottom and on the right. Patches of nothing but
                padding are not attended to, and positions are those of the image without padding.

        Returns:
            ``last_hidden_state`` (B, S + N, D), ``pooler_output`` (B, D or pooler_output_size); on request
            ``hidden_states``, L + 1 tensors (B, S + N, D), and ``attentions``, L tensors (B, A, S + N, S + N).
        """
        refuse_unknown(kwargs, self.config._attn_implementation)
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        sizes = mask = None
        if pixel_mask is not None:
            grid = self.patches(*pixel_values.shape[2:])
            sizes = unpadded_grid(pixel_mask, grid)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, sizes=sizes)  # (B, 1 + N, D)
        if self.distillation_token is not None:
            # Copy instead of expand: in inference mode a view of a parameter still requires grad, and operation
            # counters fail on it.
            token = self.embeddings.dropout(self.distillation_token.repeat(len(hidden_states), 1, 1))
            hidden_states = torch.cat([hidden_states[:, :1], token, hidden_states[:, 1:]], dim=1)  # (B, 2 + N, D)
        if sizes is not None:
            tokens = nn.functional.pad(patch_mask(sizes, grid), (self.num_prefix_tokens, 0), value=True)
            config = eager_view(self.config) if kwargs["output_attentions"] else self.config
            mask = padding_mask(config, hidden_states, tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.pool(hidden_states))


@dataclass
class TfmViTDistilledOutput(ImageClassifierOutput):
    """Output of a classifier with a distillation token.

    ``logits`` is the mean of ``cls_logits`` (class token) and ``distillation_logits``; all have shape (B, labels).
    """

    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None


class TfmViTForImageClassification(TfmViTPreTrainedModel):
    """Vision Transformer with a linear classifier, plus a second one on the distillation token if there is one.

    The DeiT paper adds the softmax outputs of both (section 4). Its code and transformers' class average the logits,
    as is done here.
    """

    _auto_class = "AutoModelForImageClassification"
    _loss_function = staticmethod(sequence_loss)
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012  when loading the encoder of an MAE checkpoint

    def __init__(self, config: TfmViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = TfmViTModel(config, add_pooling_layer=config.representation_layer)
        features = config.pooler_output_size if config.representation_layer else config.hidden_size
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels else nn.Identity()
        if config.distillation_token:
            self.distillation_classifier = (
                nn.Linear(features, config.num_labels) if config.num_labels else nn.Identity()
            )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images (B, C, H, W).

        Args:
            labels: (B,) int64 for single-label classification, or (B, labels) probabilities if ``problem_type`` is
                "single_label_classification" (mixup); otherwise as in transformers' `ViTForImageClassification`.

        Returns:
            ``loss`` scalar, ``logits`` (B, labels); a `TfmViTDistilledOutput` with a distillation token; on request
            the hidden states and attentions of `TfmViTModel`.
        """
        outputs = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits, heads = self.classifier(outputs.pooler_output), {}  # (B, labels)
        if self.config.distillation_token:
            heads = {"cls_logits": logits}
            heads["distillation_logits"] = self.distillation_classifier(outputs.last_hidden_state[:, 1])
            logits = (logits + heads["distillation_logits"]) / 2
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        output = TfmViTDistilledOutput if heads else ImageClassifierOutput
        return output(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **heads
        )


class TfmViTBackbone(BackboneMixin, TfmViTPreTrainedModel):
    """ViT encoder as a backbone that returns feature maps of selected blocks for detection and segmentation heads."""

    _auto_class = "AutoBackbone"

    def __init__(self, config: TfmViTConfig):
        super().__init__(config)
        self.vit = TfmViTModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BackboneOutput:
        """Return the feature maps of the stages in ``config.out_features``, each (B, D, H / P, W / P), after the final
        norm.

        Args:
            pixel_mask: see `TfmViTModel.forward`.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.vit(pixel_values, pixel_mask=pixel_mask, **kwargs)
        grid = self.vit.patches(*pixel_values.shape[2:])
        norm = self.vit.layernorm if self.vit.fc_norm is None else self.vit.fc_norm
        maps = [
            norm(states)[:, self.vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
            for stage, states in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        ]
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


register_native_names("TfmViTModel", NATIVE_NAMES)
