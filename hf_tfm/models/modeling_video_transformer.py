"""Video Transformer for forecasting, with attention factorised over time and space.

    videos (B, T, C, H, W) -> patches (B, T, N, D), F frames of mask tokens -> + positions of time and space
    -> blocks: attention over the frames of a patch, attention over the patches of a frame, MLP
    -> the last F frames -> linear (B, F, N, P P C) -> (B, F, C, H, W)

Divided space-time attention: Bertasius et al. 2021 (TimeSformer, arXiv:2102.05095, section 3), time before space;
there it classifies. Frames of mask tokens to be predicted in parallel, and the causal variant, are ours.

Shapes: B videos; T frames that are read, F that are predicted; C channels; H, W pixels; P patch side; N patches of a
frame in row-major order; D = config.hidden_size; A heads.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import MultiHeadAttention, wants_maps
from .blocks import FeedForward, Residual
from .configuration_video_transformer import TfmVideoTransformerConfig
from .dropout import Dropout
from .input_checks import refuse_unknown
from .losses import Items
from .modeling_vit import drop_path_rates
from .native_names import OwnNamesPreTrainedModel
from .patches import PatchEmbedding, patch_grid, sides, unpatchify
from .positions import SinusoidTable, sincos_2d
from .video import (
    VideoForecastOutput,
    check_videos,
    count_pixels,
    forecast_loss,
    frames_to_predict,
    over_frames,
    to_predictions,
    without_ignored,
)


class SpaceTimeBlock(GradientCheckpointingLayer):
    """Attention over time, attention over space, and a feed-forward layer, each with a pre-norm residual.

    Args:
        drop_path: rate, see `DropPath`.
    """

    def __init__(self, config: TfmVideoTransformerConfig, layer_idx: int, drop_path: float = 0.0):
        super().__init__()
        self.time_attn = MultiHeadAttention(config, config.autoregressive, layer_idx)
        self.time_attn_residual = Residual(config, drop_path)
        self.space_attn = MultiHeadAttention(config, layer_idx=layer_idx)
        self.space_attn_residual = Residual(config, drop_path)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config, drop_path)

    def forward(self, hidden_states: Tensor, num_frames: int, **kwargs) -> Tensor:
        """Apply the block to the tokens of all frames, frame by frame: (B, T N, D) -> (B, T N, D)."""
        B = hidden_states.shape[0]

        def over_time(states: Tensor) -> Tensor:
            columns = states.unflatten(1, (num_frames, -1)).transpose(1, 2).flatten(0, 1)  # (B N, T, D)
            mixed = self.time_attn(columns, **kwargs)[0]
            return mixed.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)  # (B, T N, D)

        def over_space(states: Tensor) -> Tensor:
            frames = states.unflatten(1, (num_frames, -1)).flatten(0, 1)  # (B T, N, D)
            return self.space_attn(frames, **kwargs)[0].reshape(states.shape)

        hidden_states = self.time_attn_residual(hidden_states, over_time)
        hidden_states = self.space_attn_residual(hidden_states, over_space)
        return self.feed_forward_residual(hidden_states, lambda states: self.feed_forward(states))


class SpaceTimePositions(nn.Module):
    """Fixed positions: the sum of the sine-cosine embeddings of a frame's number and of a patch's row and column.

    Positions of other frames and image sizes than the configuration's are computed on the fly.
    """

    def __init__(self, config: TfmVideoTransformerConfig):
        super().__init__()
        self.dim = config.hidden_size
        self.grid = patch_grid(*sides(config.image_size), config.patch_size, "image_size")
        self.time = SinusoidTable(config.context_length + config.prediction_length, config.hidden_size)
        self.register_buffer("space", sincos_2d(*self.grid, self.dim), persistent=False)

    def forward(self, frames: int, grid: tuple[int, int]) -> Tensor:
        """Return the positions (frames, N, D) of the frames of a video."""
        time = self.time(torch.arange(frames, device=self.space.device), frames)  # (frames, D)
        space = self.space if grid == self.grid else sincos_2d(*grid, self.dim).to(self.space)
        return time[:, None] + space


class TfmVideoTransformerPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the video Transformers: weight initialisation, loading and saving."""

    config: TfmVideoTransformerConfig
    base_model_prefix = "transformer"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpaceTimeBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SpaceTimeBlock, "attentions": MultiHeadAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights from a truncated normal of ``initializer_range``, and biases to zero."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TfmVideoTransformerModel):
            if module.mask_token is not None:
                init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, SinusoidTable):
            module.reset_parameters()
        elif isinstance(module, SpaceTimePositions):
            init.copy_(module.space, sincos_2d(*module.grid, module.dim))


class TfmVideoTransformerModel(TfmVideoTransformerPreTrainedModel):
    """Encoder of the patches of a video, and of future frames if they are predicted in parallel."""

    _auto_class = "AutoModel"
    # In checkpoints of the whole model.
    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012

    def __init__(self, config: TfmVideoTransformerConfig):
        super().__init__(config)
        self.patch_embeddings = PatchEmbedding(config.num_channels, config.patch_size, config.hidden_size)
        self.positions = SpaceTimePositions(config)
        self.mask_token = None if config.autoregressive else nn.Parameter(torch.zeros(1, 1, 1, config.hidden_size))
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(SpaceTimeBlock(config, i, r) for i, r in enumerate(drop_path_rates(config)))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values_videos: Tensor,
        prediction_length: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encode videos (B, T, C, H, W) of any number of frames.

        Args:
            prediction_length: number F of frames of mask tokens that follow if they are predicted at once; by
                default that of the configuration.

        Returns:
            ``last_hidden_state`` (B, (T + F) N, D), frame by frame, F = 0 with ``autoregressive``; on request
            ``hidden_states`` and ``attentions``, for each block over time, (B N, A, T + F, T + F), and over space, (B
            (T + F), A, N, N).
        """
        grid = check_videos(self.config, pixel_values_videos)
        refuse_unknown(kwargs, self.config._attn_implementation)
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        tokens = over_frames(self.patch_embeddings, pixel_values_videos)  # (B, T, N, D)
        if self.mask_token is not None:
            future = self.config.prediction_length if prediction_length is None else prediction_length
            unknown = self.mask_token.expand(tokens.shape[0], future, tokens.shape[2], -1)
            tokens = torch.cat([tokens.to(unknown.dtype), unknown], dim=1)  # (B, T + F, N, D)
        frames = tokens.shape[1]
        hidden_states = self.dropout(tokens + self.positions(frames, grid).to(tokens.dtype)).flatten(1, 2)
        for layer in self.layers:
            hidden_states = layer(hidden_states, frames, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden_states))


class TfmVideoTransformerForPrediction(TfmVideoTransformerPreTrainedModel):
    """Video Transformer that predicts the pixels of the next frames."""

    _auto_class = "AutoModelForTimeSeriesPrediction"

    def __init__(self, config: TfmVideoTransformerConfig):
        super().__init__(config)
        height, width = sides(config.patch_size)
        self.transformer = TfmVideoTransformerModel(config)
        self.head = nn.Linear(config.hidden_size, height * width * config.num_channels)
        self.post_init()

    def pixels(self, hidden_states: Tensor, videos: Tensor, count: int) -> Tensor:
        """Return the pixels (B, count, C, H, W) of the last frames of hidden states, before a sigmoid.

        Args:
            videos: (..., H, W), for their size.
        """
        rows, columns = patch_grid(*videos.shape[-2:], self.config.patch_size)
        last = self.head(hidden_states[:, -count * rows * columns :]).unflatten(1, (count, -1))  # (B, count, N, P P C)
        return over_frames(lambda patches: unpatchify(patches, self.config.patch_size, videos.shape[-2:]), last)

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        labels: Tensor | None = None,
        prediction_length: int | None = None,
        num_items_in_batch: Items | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoForecastOutput:
        """Predict the frames that follow videos (B, T, C, H, W) with pixels in [0, 1].

        With ``autoregressive``, each frame is predicted from the true ones before it if there are labels
        (teacher forcing), and from the predicted ones otherwise.

        Args:
            labels: (B, F, C, H, W), these frames, in [0, 1]; -100 for pixels that count for nothing.
            prediction_length: F; by default that of the labels, or of the configuration.
            num_items_in_batch: number of pixel values of the whole step, see `forecast_loss`.
        """
        videos = pixel_values_videos
        check_videos(self.config, videos)
        count = frames_to_predict(self.config, labels, prediction_length)
        if self.config.autoregressive and labels is not None:
            check_videos(self.config, labels, "labels")
            videos = torch.cat([videos, without_ignored(labels[:, :-1]).to(videos)], dim=1)
        outputs = self.transformer(videos, prediction_length=count, **kwargs)
        if not self.config.autoregressive or labels is not None:
            logits = self.pixels(outputs.last_hidden_state, videos, count)
        else:
            logits = self.pixels(outputs.last_hidden_state, videos, 1)
            for _ in range(count - 1):
                frame = to_predictions(self.config, logits[:, -1:])
                videos = torch.cat([videos, frame.to(videos.dtype)], dim=1)
                states = self.transformer(videos).last_hidden_state
                logits = torch.cat([logits, self.pixels(states, videos, 1)], dim=1)
        loss = None if labels is None else forecast_loss(self.config, logits, labels, num_items_in_batch)
        return VideoForecastOutput(
            loss=loss,
            predictions=to_predictions(self.config, logits),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def count_items(self, labels: Tensor, **batch) -> Tensor:
        """Return the ``num_items_in_batch`` of a batch: the number of pixel values with a label."""
        return count_pixels(labels)
