"""Swin Transformer (Liu et al. 2021, arXiv:2103.14030, figure 3).

    pixels (B, 3, H, W) -> patches (B, h w, C) -> 4 stages of pre-norm blocks with attention in windows, each followed,
    except for the last, by patch merging: (B, h w, C) -> (B, h w / 4, 2 C) -> mean of tokens -> logits (B, labels)

Weights are named as in transformers' Swin (5.24), which reads files of these classes and vice versa.

Shapes: B images; H, W pixels; h, w rows and columns of tokens of a stage; C hidden size of a stage; nW windows of an
image; T tokens of a window; A heads of a stage.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import AttentionLayer, explicit_attention, wants_maps
from .blocks import FUSED, DropPath
from .configuration_swin import TfmSwinConfig
from .dropout import Dropout
from .input_checks import refuse_unknown
from .losses import sequence_loss
from .native_names import OwnNamesPreTrainedModel, register_native_names
from .patches import PatchEmbedding, Size, resize_grid
from .windows import Windows, fit_windows, from_windows, is_traced, relative_index, shift_mask, to_windows

# Weight names of Swin files of transformers before 5.24, which it still writes: (name in the file, name in the model),
# applied in this order on loading. Each pattern is anchored to a block.
NATIVE_NAMES = (
    (r"(?<=\d\.)attention\.self\.query\.", "attention.q_proj."),
    (r"(?<=\d\.)attention\.self\.key\.", "attention.k_proj."),
    (r"(?<=\d\.)attention\.self\.value\.", "attention.v_proj."),
    (
        r"(?<=\d\.)attention\.self\.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"(?<=\d\.)attention\.output\.dense\.", "attention.o_proj."),
    (r"(?<=\d\.)intermediate\.dense\.", "mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


@dataclass
class TfmSwinModelOutput(BaseModelOutputWithPooling):
    """Output of a `TfmSwinModel`; ``reshaped_hidden_states`` are the hidden states as maps (B, C, h, w)."""

    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class TfmSwinImageClassifierOutput(ImageClassifierOutput):
    """Output of a `TfmSwinForImageClassification`; see `TfmSwinModelOutput`."""

    reshaped_hidden_states: tuple[Tensor, ...] | None = None


def drop_path_rates(config: TfmSwinConfig) -> list[list[float]]:
    """Return the drop-path rate of each block, by stage; it rises linearly from 0 to ``drop_path_rate``."""
    last = max(sum(config.depths) - 1, 1)
    rates = [config.drop_path_rate * i / last for i in range(sum(config.depths))]
    return [[rates.pop(0) for _ in range(depth)] for depth in config.depths]


def as_map(hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h w, C) -> (B, C, h, w)."""
    return hidden_states.transpose(1, 2).unflatten(2, grid)


def as_autocast(states: Tensor) -> Tensor:
    """Convert states to the dtype of autocast, once instead of in each of several linear layers."""
    kind = states.device.type
    if is_traced() or states.is_meta or not torch.is_autocast_enabled(kind) or states.dtype != torch.float32:
        return states
    return states.to(torch.get_autocast_dtype(kind))


class TfmSwinEmbeddings(nn.Module):
    """Linear patch embeddings, normalised.

    Images that patches do not divide are padded with zeros at the bottom and on the right, as in transformers and in
    the authors' detection code; with ``window_fit="torchvision"`` they are cropped there, as torchvision's strided
    convolution does.
    """

    def __init__(self, config: TfmSwinConfig):
        super().__init__()
        self.patch_embeddings = PatchEmbedding(config.num_channels, config.patch_size, config.embed_dim)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.crops = config.window_fit == "torchvision"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, 3, H, W) -> tokens (B, h w, C), and (h, w).

        Raises:
            ValueError: the number of channels is wrong, or the images are smaller than a patch and would be cropped.
        """
        if pixel_values.ndim == 4:
            (height, width), (patch_height, patch_width) = pixel_values.shape[2:], self.patch_embeddings.patch_size
            if self.crops:
                kept = pixel_values[:, :, : height - height % patch_height, : width - width % patch_width]
                pixel_values = kept.contiguous()
            elif height % patch_height or width % patch_width:
                pixel_values = nn.functional.pad(pixel_values, (0, -width % patch_width, 0, -height % patch_height))
        grid = self.patch_embeddings.check(pixel_values)
        if not all(grid):
            raise ValueError(
                f"pixel_values must be at least as large as a patch of {self.patch_embeddings.patch_size}, got "
                f"{tuple(pixel_values.shape)}"
            )
        return self.dropout(self.norm(self.patch_embeddings(pixel_values))), grid


class RelativePositionBias(nn.Module):
    """Bias of attention scores, learned for each head and each relative position of two tokens (equation 4).

    Args:
        window_size: M; the table has (2 M - 1)^2 rows.
        num_heads: A.
    """

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Return the bias (A, T, T) of windows of (rows, columns), which may be smaller than M."""
        table = self.relative_position_bias_table
        index = relative_index(size, self.window_size, table.device)  # (T, T)
        # On a CPU the backward pass of an embedding is faster than that of indexing.
        return nn.functional.embedding(index, table).permute(2, 0, 1)

    @torch.no_grad()
    def set_window_size(self, window_size: int) -> None:
        """Resize the table permanently by bicubic interpolation, as the authors do for fine-tuning."""
        old, new = 2 * self.window_size - 1, 2 * window_size - 1
        table = resize_grid(self.relative_position_bias_table[None], (old, old), (new, new))[0]
        self.relative_position_bias_table = nn.Parameter(table.clone())
        self.window_size = window_size


class WindowAttention(AttentionLayer):
    """Multi-head self-attention within windows (section 3.2).

    Args:
        hidden_size: C.
        num_heads: A.
    """

    def __init__(self, config: TfmSwinConfig, hidden_size: int, num_heads: int):
        super().__init__(config, hidden_size, num_heads, config.attention_probs_dropout_prob)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        bias = RelativePositionBias(config.window_size, num_heads) if config.use_relative_position_bias else None
        self.relative_position_bias = bias

    def attention_function(self, query: Tensor, key: Tensor, output_attentions: bool) -> Callable:
        """Select the attention function, see `AttentionLayer`.

        For training on a CPU explicit attention: torch has no kernel there that gives the gradient of a bias, and what
        it does instead takes 1.2 (float32) to 3 times (bf16) as long for windows of 7 (torch 2.14, Zen 4).
        """
        trains = torch.is_grad_enabled() and self.relative_position_bias is not None
        if self.config._attn_implementation == "sdpa" and query.device.type == "cpu" and trains and not is_traced():
            return explicit_attention
        return super().attention_function(query, key, output_attentions)

    def normalize(self, scores: Tensor) -> Tensor:
        """Compute probabilities from masked scores (B nW, A, T, T).

        On a CPU the softmax of short rows in bf16 takes twice as long as in float32 (torch 2.14, Zen 4).
        """
        if scores.device.type == "cpu" and scores.dtype == torch.bfloat16:
            return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
        return super().normalize(scores)

    def mask(self, windows: Windows, states: Tensor) -> Tensor | None:
        """Return what is added to the scores: (1 or nW, 1 or A, T, T) in the dtype of ``states``, or None."""
        bias, mask = None, None
        if self.relative_position_bias is not None:
            bias = self.relative_position_bias(windows.size)[None].to(states.dtype)  # (1, A, T, T)
        if windows.is_shifted:
            mask = shift_mask(windows, states.device, states.dtype)[:, None]  # (nW, 1, T, T)
        return mask if bias is None else bias if mask is None else bias + mask

    def forward(
        self, hidden_states: Tensor, windows: Windows, output_attentions: bool = False, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention.

        Args:
            hidden_states: (B nW, T, C).
            windows: their layout.
            output_attentions: compute the probabilities, whatever the backend.

        Returns:
            (B nW, T, C), and the probabilities (B nW, A, T, T), or None if the backend does not compute them.
        """
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (B nW, A, T, C / A)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        mask = self.mask(windows, query)
        function = self.attention_function(query, key, output_attentions)
        if function is not explicit_attention and mask is not None and mask.shape[0] > 1:
            mask = mask.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)  # a row for each window of the batch
        mixed, probabilities = function(
            self, query, key, value, mask, scaling=self.scaling, dropout=self.dropout_rate(), **kwargs
        )  # (B nW, T, A, C / A)
        return self.o_proj(mixed.reshape(hidden_states.shape)), probabilities


class SwinMLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, config: TfmSwinConfig, hidden_size: int):
        super().__init__()
        inner = int(config.mlp_ratio * hidden_size)
        self.fc1 = nn.Linear(hidden_size, inner)
        self.activation = ACT2FN[FUSED.get(config.hidden_act, config.hidden_act)]
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, h w, C) -> (B, h w, C)."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SwinBlock(GradientCheckpointingLayer):
    """Pre-norm block with attention in windows (equation 3).

    Args:
        hidden_size: C.
        num_heads: A.
        drop_path: stochastic depth rate, of both branches as in the authors' code (transformers drops only attention).
        shifted: shift the windows.
    """

    def __init__(self, config: TfmSwinConfig, hidden_size: int, num_heads: int, drop_path: float, shifted: bool):
        super().__init__()
        self.config, self.shifted = config, shifted
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = WindowAttention(config, hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwinMLP(config, hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, hidden_states: Tensor, grid: tuple[int, int], always_partition: bool = False, **kwargs
    ) -> Tensor:
        """Apply the block: (B, h w, C) -> (B, h w, C).

        Args:
            grid: (h, w).
            always_partition: see `fit_windows`.
        """
        config = self.config
        windows = fit_windows(grid, config.window_size, self.shifted, config.window_fit, always_partition)
        states = to_windows(as_autocast(self.layernorm_before(hidden_states)), windows)  # (B nW, T, C)
        states, _ = self.attention(states, windows, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(from_windows(states, windows)))
        states = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(states))


class PatchMerging(nn.Module):
    """Merge 2 x 2 neighbouring tokens into one of twice the width; odd maps are padded with zeros.

    Args:
        hidden_size: C.
    """

    def __init__(self, config: TfmSwinConfig, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * hidden_size, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * hidden_size, 2 * hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(B, h w, C) -> (B, h w / 4, 2 C), and (h / 2, w / 2), rounded up."""
        features = hidden_states.unflatten(1, grid)  # (B, h, w, C)
        if grid[0] % 2 or grid[1] % 2:
            features = nn.functional.pad(features, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        B, h, w, C = features.shape
        # The row of a neighbour runs faster than its column.
        merged = features.view(B, h // 2, 2, w // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, -1, 4 * C)
        return self.reduction(self.norm(merged)), (h // 2, w // 2)


class SwinStage(nn.Module):
    """Blocks of one size, with and without shifted windows in turn, then patch merging."""

    def __init__(self, config: TfmSwinConfig, stage: int, rates: list[float]):
        super().__init__()
        width, heads = config.width(stage), config.num_heads[stage]
        self.blocks = nn.ModuleList(
            SwinBlock(config, width, heads, rate, shifted=config.use_shift and i % 2 == 1)
            for i, rate in enumerate(rates)
        )
        self.downsample = PatchMerging(config, width) if stage < len(config.depths) - 1 else None

    def forward(
        self, hidden_states: Tensor, grid: tuple[int, int], **kwargs
    ) -> tuple[Tensor, tuple[int, int], Tensor]:
        """Apply the stage to (B, h w, C).

        Returns:
            the input of the next stage and its grid, and the output of the last block (B, h w, C).
        """
        for block in self.blocks:
            hidden_states = block(hidden_states, grid, **kwargs)
        before = hidden_states
        if self.downsample is not None:
            hidden_states, grid = self.downsample(hidden_states, grid)
        return hidden_states, grid, before


class SwinEncoder(nn.Module):
    """All stages."""

    def __init__(self, config: TfmSwinConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            SwinStage(config, stage, rates) for stage, rates in enumerate(drop_path_rates(config))
        )


class TfmSwinPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the Swin models: weight initialisation, loading and saving."""

    config: TfmSwinConfig
    base_model_prefix = "swin"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TfmSwinEmbeddings", "SwinBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": WindowAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"
    # Computed from the sizes; files of transformers before 5.24 and of the authors have it.
    _keys_to_ignore_on_load_unexpected = [r"relative_position_index"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights and position biases from a truncated normal of ``initializer_range``, other biases to
        zero.

        As in the authors' code, except for the convolution of the patches, which they leave to torch.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RelativePositionBias):
            init.trunc_normal_(module.relative_position_bias_table, std=std)

    def set_window_size(self, window_size: int) -> None:
        """Adapt the model to windows of another size, for fine-tuning, by resizing the position biases.

        Raises:
            ValueError: the size is not positive.
        """
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        for module in self.modules():
            if isinstance(module, RelativePositionBias):
                module.set_window_size(window_size)
        self.config.window_size = window_size


class TfmSwinModel(TfmSwinPreTrainedModel):
    """Swin encoder without a classifier.

    Args:
        add_pooling_layer: also return the mean of the tokens.
        add_final_norm: normalise the output of the last stage.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: TfmSwinConfig, add_pooling_layer: bool = True, add_final_norm: bool = True):
        super().__init__(config)
        self.embeddings = TfmSwinEmbeddings(config)
        self.encoder = SwinEncoder(config)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else nn.Identity()
        self.layernorm = norm
        self.add_pooling_layer = add_pooling_layer
        self.gradient_checkpointing = False
        self.post_init()

    def set_image_size(self, image_size: Size) -> None:
        """Note the size of images in pixels; no parameter depends on it."""
        self.config.image_size = image_size

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        always_partition: bool = False,
        before_merging: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TfmSwinModelOutput:
        """Encode images (B, 3, H, W) of any height and width.

        Args:
            output_hidden_states: return the patch embeddings and the output of every stage.
            always_partition: see `fit_windows`.
            before_merging: let ``reshaped_hidden_states`` be the outputs of the last blocks, before patch merging.

        Returns:
            ``last_hidden_state`` (B, h w, C) of the last stage, ``pooler_output`` (B, C); on request, by stage,
            ``hidden_states`` (B, h w, C) and ``reshaped_hidden_states`` (B, C, h, w), both after merging; and
            ``attentions``, of each block (B nW, A, T, T).
        """
        refuse_unknown(kwargs, self.config._attn_implementation)
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states, grid = self.embeddings(pixel_values)
        states, maps = [hidden_states], [as_map(hidden_states, grid)] if wanted else []
        for stage in self.encoder.layers:
            earlier = grid
            hidden_states, grid, before = stage(hidden_states, grid, always_partition=always_partition, **kwargs)
            if wanted:
                states.append(hidden_states)
                maps.append(as_map(before, earlier) if before_merging else as_map(hidden_states, grid))
        last = self.layernorm(hidden_states)
        return TfmSwinModelOutput(
            last_hidden_state=last,
            pooler_output=last.mean(dim=1) if self.add_pooling_layer else None,
            hidden_states=tuple(states) if wanted else None,
            reshaped_hidden_states=tuple(maps) if wanted else None,
        )


class TfmSwinForImageClassification(TfmSwinPreTrainedModel):
    """Swin Transformer with a linear classifier on the mean of the tokens."""

    _auto_class = "AutoModelForImageClassification"
    _loss_function = staticmethod(sequence_loss)

    def __init__(self, config: TfmSwinConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.swin = TfmSwinModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> TfmSwinImageClassifierOutput:
        """Classify images (B, 3, H, W).

        Args:
            labels: (B,) int64 for single-label classification, or (B, labels) probabilities if ``problem_type`` is
                "single_label_classification" (mixup); otherwise as in transformers' `SwinForImageClassification`.

        Returns:
            ``loss`` scalar, ``logits`` (B, labels); on request the hidden states and attentions of `TfmSwinModel`.
        """
        outputs = self.swin(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)  # (B, labels)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return TfmSwinImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class TfmSwinBackbone(BackboneMixin, TfmSwinPreTrainedModel):
    """Swin encoder as a backbone that returns feature maps of selected stages for detection and segmentation heads.

    As in transformers' `SwinBackbone` and in the authors' detection code, windows are never reduced to the size of a
    small feature map, and each map has a norm of its own.
    """

    _auto_class = "AutoBackbone"
    # The norm of a classifier; here each map has one.
    _keys_to_ignore_on_load_unexpected = [r"relative_position_index", r"^swin\.layernorm\."]  # noqa: RUF012

    def __init__(self, config: TfmSwinConfig):
        super().__init__(config)
        self.swin = TfmSwinModel(config, add_pooling_layer=False, add_final_norm=False)
        self.num_features = [config.embed_dim, *(config.width(stage) for stage in range(len(config.depths)))]
        self.hidden_states_norms = nn.ModuleDict(
            {
                stage: nn.LayerNorm(channels, eps=config.layer_norm_eps)
                for stage, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return the feature maps of the stages in ``config.out_features``, each (B, C, h, w), before patch merging.

        The strides are those of the patches (the "stem" and "stage1"), and twice that of the stage before.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.swin(pixel_values, always_partition=True, before_merging=True, **kwargs)
        maps = []
        for stage, features in zip(self.stage_names, outputs.reshaped_hidden_states, strict=True):
            if stage in self.out_features:
                norm = self.hidden_states_norms[stage]
                maps.append(norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous())
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.reshaped_hidden_states, attentions=outputs.attentions
        )


register_native_names("TfmSwinModel", NATIVE_NAMES)
