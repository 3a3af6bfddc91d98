"""Masked autoencoder (He et al. 2021, arXiv:2111.06377, figure 1).

    pixels (B, C, H, W) -> K of N patches -> encoder -> (B, 1 + K, D) -> insert mask tokens -> decoder -> (B, N, P P C)

Shapes: B images; C channels; H, W pixels; P patch side; N patches in row-major order; K visible patches;
D = config.hidden_size; E = config.decoder_hidden_size. In a mask, 1 is hidden and 0 is visible.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput, ViTMAEModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import ConfigView, wants_maps
from .blocks import EncoderBlock
from .configuration_mae import TfmMAEConfig
from .image_embeddings import TfmViTEmbeddings, fixed_positions
from .input_checks import refuse_unknown
from .losses import per_item
from .modeling_vit import NATIVE_NAMES, TfmViTPreTrainedModel, encoder_blocks
from .native_names import register_native_names
from .patches import Size, patchify, resize_grid, sides, unpatchify


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches, ``floor(N (1 - mask_ratio))``, at least 1.

    The 1e-6 absorbs rounding errors: ``100 * (1 - 0.9)`` is 9.999..., which the authors' ``int()`` truncates to 9.
    """
    return max(1, math.floor(num_patches * (1.0 - mask_ratio) + 1e-6))


def random_masking(
    batch_size: int, num_patches: int, mask_ratio: float, noise: Tensor | None = None, device: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample K visible patches of each image without replacement (section 3, "Simple implementation").

    Args:
        batch_size, num_patches: B and N.
        mask_ratio: fraction of patches to hide, in [0, 1); 0.75 in the paper.
        noise: (B, N) scores; the K smallest of each row stay visible. Default: uniform, from torch's global generator.

    Returns:
        keep: (B, K) int64, indices of the visible patches, in shuffled order.
        mask: (B, N) float32, 1 = hidden, in image order.
        restore: (B, N) int64; gathering ``cat([visible, hidden], dim=1)`` with it restores the image order.

    Raises:
        ValueError: ``noise`` is not (B, N).
    """
    if noise is None:
        noise = torch.rand(batch_size, num_patches, device=device)
    if noise.shape != (batch_size, num_patches):
        raise ValueError(f"noise must have shape {(batch_size, num_patches)}, got {tuple(noise.shape)}")
    visible = num_visible(num_patches, mask_ratio)
    shuffle = noise.to(device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)  # inverse permutation: index of each patch in the shuffled order
    return shuffle[:, :visible], (restore >= visible).float(), restore


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each patch over its pixels; return patches (B, N, P P C), mean and standard deviation (B, N, 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


def decoder_view(config: TfmMAEConfig) -> ConfigView:
    """Return a view of the configuration for the decoder's blocks, with the ``decoder_`` fields unprefixed."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return ConfigView(config, **{name: getattr(config, f"decoder_{name}") for name in names})


class TfmMAEPreTrainedModel(TfmViTPreTrainedModel):
    """Base class of the MAE models: weight initialisation, loading and saving."""

    config: TfmMAEConfig
    _no_split_modules = ["TfmViTEmbeddings", "EncoderBlock", "TfmMAEDecoder"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as in appendix A.1: Xavier uniform for matrices and the patch embedding, N(0, 0.02) for
        tokens.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            # Flatten the patch embedding to a matrix: for the convolution Xavier would compute the fan-out as P P D.
            init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, TfmViTEmbeddings):
            init.normal_(module.cls_token, std=std)
        elif isinstance(module, TfmMAEDecoder):
            init.normal_(module.mask_token, std=std)
            init.copy_(module.decoder_pos_embed, module.fixed_positions())


class TfmMAEModel(TfmMAEPreTrainedModel):
    """MAE encoder: a Vision Transformer over the visible patches only (section 3, "MAE encoder")."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012  in checkpoints of the full autoencoder

    def __init__(self, config: TfmMAEConfig):
        super().__init__(config)
        self.embeddings = TfmViTEmbeddings(config)
        self.layers = encoder_blocks(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def set_image_size(self, image_size: Size) -> None:
        """Adapt the model to images of another size in pixels, to continue training at that size.

        Raises:
            ValueError: the image size is not divisible by the patch size.
        """
        self.embeddings.set_image_size(image_size)
        self.config.image_size = image_size

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTMAEModelOutput:
        """Encode a random subset of the patches of images (B, C, H, W).

        Args:
            noise: (B, N) scores that select the visible patches; see `random_masking`.
            interpolate_pos_encoding: see `TfmViTEmbeddings.forward`.

        Returns:
            ``last_hidden_state`` (B, 1 + K, D), the [class] token first; ``mask`` (B, N); ``ids_restore`` (B, N); on
            request ``hidden_states`` and ``attentions``.
        """
        rows, columns = self.embeddings.patch_embeddings.check(pixel_values)
        keep, mask, restore = random_masking(
            pixel_values.shape[0], rows * columns, self.config.mask_ratio, noise, pixel_values.device
        )
        refuse_unknown(kwargs, self.config._attn_implementation)
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, keep)  # (B, 1 + K, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, **kwargs)
        return ViTMAEModelOutput(last_hidden_state=self.layernorm(hidden_states), mask=mask, ids_restore=restore)


class TfmMAEDecoder(nn.Module):
    """MAE decoder: insert mask tokens for hidden patches, then predict pixels (section 3, "MAE decoder")."""

    def __init__(self, config: TfmMAEConfig, grid: tuple[int, int]):
        super().__init__()
        view = decoder_view(config)
        height, width = sides(config.patch_size)
        self.grid = grid
        self.decoder_embed = nn.Linear(config.hidden_size, view.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, view.hidden_size))
        self.register_buffer("decoder_pos_embed", self.fixed_positions())
        self.decoder_layers = nn.ModuleList(EncoderBlock(view, i) for i in range(view.num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(view.hidden_size, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(view.hidden_size, height * width * config.num_channels)

    def fixed_positions(self) -> Tensor:
        """Return the fixed positions of the grid, zero for the [class] token: (1, 1 + N, E)."""
        return fixed_positions(self.grid, self.mask_token.shape[-1])

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resize the decoder to a grid of (rows, columns) patches."""
        self.grid = grid
        self.decoder_pos_embed = self.fixed_positions().to(self.decoder_pos_embed)

    def forward(self, hidden_states: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict the pixels (B, N, P P C) of a grid of patches from the encoded visible patches.

        Args:
            hidden_states: (B, 1 + K, D).
            restore: (B, N) int64, see `random_masking`.
            grid: (rows, columns) of patches.
        """
        states = self.decoder_embed(hidden_states)  # (B, 1 + K, E)
        B, N = restore.shape
        # Under autocast the float32 mask token promotes all tokens to float32, as in the encoder and transformers'
        # ViTMAE, so that residual sums are not rounded. In a half-precision model only the sum with the positions is
        # float32.
        dtype = self.mask_token.dtype
        hidden = self.mask_token.expand(B, N + 1 - states.shape[1], -1)
        tokens = torch.cat([states[:, 1:].to(dtype), hidden], dim=1)  # (B, N, E), still shuffled
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, tokens.shape[-1]))
        first, positions = self.decoder_pos_embed[:, :1], resize_grid(self.decoder_pos_embed[:, 1:], self.grid, grid)
        tokens = torch.cat([states[:, :1] + first, tokens + positions], dim=1).to(dtype)
        for layer in self.decoder_layers:
            tokens = layer(tokens, None)
        return self.decoder_pred(self.decoder_norm(tokens[:, 1:]))


class TfmMAEForPreTraining(TfmMAEPreTrainedModel):
    """Masked autoencoder with its reconstruction loss."""

    _auto_class = "AutoModelForPreTraining"
    # The encoder's plans are defined in the configuration.
    _tp_plan = {  # noqa: RUF012
        f"decoder.decoder_layers.*.{part}": "rowwise" if part.endswith(("out_proj", "down_proj")) else "colwise"
        for part in (
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            *(f"feed_forward.{name}_proj" for name in ("up", "down")),
        )
    }
    _fsdp_plan = {"decoder.decoder_layers.*": "free_full_weight"}  # noqa: RUF012

    def __init__(self, config: TfmMAEConfig):
        super().__init__(config)
        self.vit = TfmMAEModel(config)
        self.decoder = TfmMAEDecoder(config, self.vit.embeddings.grid)
        self.post_init()

    def set_image_size(self, image_size: Size) -> None:
        """See `TfmMAEModel.set_image_size`."""
        self.vit.set_image_size(image_size)
        self.decoder.set_grid(self.vit.embeddings.grid)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTMAEForPreTrainingOutput:
        """Reconstruct images (B, C, H, W) from a random subset of their patches.

        Args:
            noise: (B, N) scores that select the visible patches; see `random_masking`.
            interpolate_pos_encoding: see `TfmViTEmbeddings.forward`.
            num_items_in_batch: number of hidden patches in the whole step, see `losses`; default: in this batch.
            return_loss: compute the loss; Trainer detects by this argument that the model needs no labels.

        Returns:
            ``loss`` scalar, the mean squared error over hidden patches; ``logits`` (B, N, P P C), pixels, normalised
            over each patch with ``norm_pix_loss``; ``mask`` (B, N); ``ids_restore`` (B, N); on request
            ``hidden_states`` and ``attentions`` of the encoder.
        """
        outputs = self.vit(pixel_values, noise=noise, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        grid = self.vit.embeddings.patch_embeddings.check(pixel_values)
        logits = self.decoder(outputs.last_hidden_state, outputs.ids_restore, grid)  # (B, N, P P C)
        loss = None
        if return_loss:
            loss = self.reconstruction_loss(pixel_values, logits, outputs.mask, num_items_in_batch)
        return ViTMAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=outputs.mask,
            ids_restore=outputs.ids_restore,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def count_items(self, pixel_values: Tensor, **batch) -> int:
        """Return the ``num_items_in_batch`` of a batch: the number of hidden patches."""
        rows, columns = self.vit.embeddings.patch_embeddings.check(pixel_values)
        visible = num_visible(rows * columns, self.config.mask_ratio)
        return pixel_values.shape[0] * (rows * columns - visible)

    def reconstruction_loss(
        self, pixel_values: Tensor, logits: Tensor, mask: Tensor, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        """Return the mean squared error over the pixels of hidden patches (section 3, "Reconstruction target")."""
        target = patchify(pixel_values, self.config.patch_size).float()
        if self.config.norm_pix_loss:
            target = normalize_patches(target)[0]
        loss = (logits.float() - target).square().mean(dim=-1)  # (B, N)
        return per_item((loss * mask).sum(), mask.sum(), num_items_in_batch)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        """Replace the hidden patches of images by their prediction, in the scale of the input: (B, C, H, W).

        Normalised predictions are rescaled with the mean and deviation of the true patch, as in the paper's figures.
        """
        patches = patchify(pixel_values, self.config.patch_size).float()
        predicted = logits.float()
        if self.config.norm_pix_loss:
            _, mean, deviation = normalize_patches(patches)
            predicted = predicted * deviation + mean
        mixed = torch.where(mask[..., None].bool(), predicted, patches)
        return unpatchify(mixed, self.config.patch_size, pixel_values.shape[2:])


register_native_names("TfmMAEModel", NATIVE_NAMES)
register_native_names("TfmMAEForPreTraining", NATIVE_NAMES)
