"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929, figure 1).

    pixels (B, C, H, W) -> patches (B, N, D) + positions -> [class] + N tokens -> pre-norm blocks -> (B, 1 + N, D)
    -> class token or mean of patches (B, D) -> logits (B, labels)

With DeiT's distillation token (Touvron et al. 2021, arXiv:2012.12877, section 4) it is [class] + [distillation] + N.

Shapes: B images; C channels; H, W pixels; N patches, row by row; D = config.hidden_size; A heads; S tokens before the
patches, 1 or, with a distillation token, 2.
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

from .attention import MultiHeadAttention, wants_maps
from .backbones import reset
from .blocks import EncoderBlock
from .configuration_vit import TfmViTConfig
from .image_embeddings import TfmViTEmbeddings
from .input_checks import refuse_unknown
from .losses import sequence_loss
from .native_names import OwnNamesPreTrainedModel, register_native_names
from .patches import Size, patch_grid

# Files of transformers' own ViT, and of earlier versions of this package: (name in a file, name in the model), in
# this order when loading. Anchored to a block, so that modules which a subclass adds keep their names.
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
    """The rate of each block, from 0 in the first to ``drop_path_rate`` in the last."""
    last = max(config.num_hidden_layers - 1, 1)
    return [config.drop_path_rate * i / last for i in range(config.num_hidden_layers)]


def encoder_blocks(config: TfmViTConfig) -> nn.ModuleList:
    """The L blocks of equations 2 and 3."""
    return nn.ModuleList(EncoderBlock(config, i, rate) for i, rate in enumerate(drop_path_rates(config)))


class TfmViTPreTrainedModel(OwnNamesPreTrainedModel):
    """Weights, loading and saving of the family."""

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
        """Truncated normal of ``initializer_range``, as DeiT; zeros for biases."""
        std = self.config.initializer_range
        if reset(module):
            return
        if isinstance(module, nn.Linear | nn.Conv2d):
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
    """The representation layer: a linear layer with an activation (section 3.1)."""

    def __init__(self, config: TfmViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, pooler_output_size)."""
        return self.activation(self.dense(features))


class TfmViTModel(TfmViTPreTrainedModel):
    """The encoder, without a classifier.

    Args:
        add_pooling_layer: put the representation layer on what stands for the image.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: TfmViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = TfmViTEmbeddings(config)
        # Its position is part of it: DeiT learns both, but only their sum is ever seen.
        token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.distillation_token else None
        self.distillation_token = token
        self.num_prefix_tokens = 1 if token is None else 2
        self.layers = encoder_blocks(config)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # A mean is normed after pooling, and nothing before it (MAE's fine-tuning; He et al. 2021, appendix A.1).
        self.layernorm = norm if config.pooling == "cls" else nn.Identity()
        self.fc_norm = norm if config.pooling == "mean" else None
        self.pooler = TfmViTPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def set_image_size(self, image_size: Size) -> None:
        """Make the model one for images of another size in pixels, to fine-tune it there: positions are resized.

        Raises:
            ValueError: the patch does not divide the images.
        """
        self.embeddings.set_image_size(image_size)
        self.config.image_size = image_size

    def pool(self, hidden_states: Tensor) -> Tensor:
        """What stands for the image: (B, S + N, D) -> (B, D), or the features of the representation layer."""
        features = hidden_states[:, 0] if self.fc_norm is None else self.fc_norm(hidden_states[:, 1:].mean(dim=1))
        return features if self.pooler is None else self.pooler(features)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode images (B, C, H, W) of any height and width that the patch divides.

        Args:
            interpolate_pos_encoding: see `TfmViTEmbeddings.forward`.

        Returns:
            ``last_hidden_state`` (B, S + N, D), ``pooler_output`` (B, D or pooler_output_size); on request
            ``hidden_states``, L + 1 of (B, S + N, D), and ``attentions``, L of (B, A, S + N, S + N).
        """
        refuse_unknown(kwargs, self.config._attn_implementation)
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)  # (B, 1 + N, D)
        if self.distillation_token is not None:
            # A copy: in inference mode a view of a parameter still wants gradients, and operations cannot be counted.
            token = self.embeddings.dropout(self.distillation_token.repeat(len(hidden_states), 1, 1))
            hidden_states = torch.cat([hidden_states[:, :1], token, hidden_states[:, 1:]], dim=1)  # (B, 2 + N, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.pool(hidden_states))


@dataclass
class TfmViTDistilledOutput(ImageClassifierOutput):
    """What a classifier with a distillation token gives; ``logits`` are the mean of ``cls_logits``, the class token's,
    and ``distillation_logits``, (B, labels) each."""

    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None


class TfmViTForImageClassification(TfmViTPreTrainedModel):
    """The Vision Transformer with a linear classifier, and with a second one on the distillation token if it has one.

    DeiT adds the softmax of both (section 4); its code and transformers' class take the mean of the logits, as here.
    """

    _auto_class = "AutoModelForImageClassification"
    _loss_function = staticmethod(sequence_loss)
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012  a masked autoencoder's; its encoder is taken

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
            labels: (B,) int64 for single-label classification, or (B, labels) probabilities when ``problem_type`` says
                so (mixup); else as transformers' `ViTForImageClassification`.

        Returns:
            ``loss`` scalar, ``logits`` (B, labels), those of a distillation token as `TfmViTDistilledOutput`; on
            request what `TfmViTModel` gives.
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
    """The encoder as a backbone: feature maps of chosen blocks, for detection and segmentation heads."""

    _auto_class = "AutoBackbone"

    def __init__(self, config: TfmViTConfig):
        super().__init__(config)
        self.vit = TfmViTModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Feature maps of the stages in ``config.out_features``, each (B, D, H / P, W / P), under the final norm."""
        kwargs["output_hidden_states"] = True
        outputs = self.vit(pixel_values, **kwargs)
        embeddings = self.vit.embeddings
        height, width = pixel_values.shape[2:]
        if embeddings.backbone is not None:
            height, width = embeddings.backbone.grid(height, width)
        grid = patch_grid(height, width, self.config.patch_size)
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
