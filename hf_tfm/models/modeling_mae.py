"""The masked autoencoder: hide most patches, encode the rest, reconstruct the hidden ones (He et al. 2021,
arXiv:2111.06377, figure 1).

    pixels (B, C, H, W) -> K of N patches -> encoder -> (B, 1 + K, D) -> mask tokens put in -> decoder -> (B, N, P P C)

Shapes: B images; C channels; H, W pixels; P patch side; N patches, row by row; K kept; D = config.hidden_size;
E = config.decoder_hidden_size. In a mask 1 is hidden, 0 visible.
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
    """``floor(N (1 - mask_ratio))``, at least 1.

    The 1e-6 absorbs rounding: ``100 * (1 - 0.9)`` is 9.999..., which the authors' ``int()`` makes 9, not 10.
    """
    return max(1, math.floor(num_patches * (1.0 - mask_ratio) + 1e-6))


def random_masking(
    batch_size: int, num_patches: int, mask_ratio: float, noise: Tensor | None = None, device: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose K patches of each image at random, without replacement (section 3, "Simple implementation").

    Args:
        batch_size, num_patches: B and N.
        mask_ratio: share of patches hidden, in [0, 1); the paper uses 0.75.
        noise: (B, N); the K smallest scores of a row stay visible. Default: uniform, from torch's global generator.

    Returns:
        keep: (B, K) int64, the visible patches in shuffled order.
        mask: (B, N) float32, 1 = hidden, in image order.
        restore: (B, N) int64; gathering ``cat([visible, hidden], dim=1)`` with it puts patches back in image order.

    Raises:
        ValueError: ``noise`` is not (B, N).
    """
    if noise is None:
        noise = torch.rand(batch_size, num_patches, device=device)
    if noise.shape != (batch_size, num_patches):
        raise ValueError(f"noise must have shape {(batch_size, num_patches)}, got {tuple(noise.shape)}")
    visible = num_visible(num_patches, mask_ratio)
    shuffle = noise.to(device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)  # the inverse permutation: place of each patch in the shuffled list
    return shuffle[:, :visible], (restore >= visible).float(), restore


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch with mean 0 and variance 1 over its pixels: (B, N, P P C), and the mean and deviation (B, N, 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


def decoder_view(config: TfmMAEConfig) -> ConfigView:
    """The configuration as the decoder's blocks read it: ``hidden_size`` is ``decoder_hidden_size`` and so on."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return ConfigView(config, **{name: getattr(config, f"decoder_{name}") for name in names})


class TfmMAEPreTrainedModel(TfmViTPreTrainedModel):
    """Weights, loading and saving of the family."""

    config: TfmMAEConfig
    _no_split_modules = ["TfmViTEmbeddings", "EncoderBlock", "TfmMAEDecoder"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in appendix A.1: Xavier uniform for matrices, the patch embedding among them; N(0, 0.02) for tokens."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            # The patch embedding as the matrix it is: of a convolution Xavier would take the fan-out for P P D.
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
    """The encoder: a Vision Transformer that sees the visible patches alone (section 3, "MAE encoder")."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012  of the whole autoencoder

    def __init__(self, config: TfmMAEConfig):
        super().__init__(config)
        self.embeddings = TfmViTEmbeddings(config)
        self.layers = encoder_blocks(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def set_image_size(self, image_size: Size) -> None:
        """Make the model one for images of another size in pixels, to go on with training there.

        Raises:
            ValueError: the patch does not divide the images.
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
        """Encode a random part of the patches of images (B, C, H, W).

        Args:
            noise: (B, N), decides which patches stay; see `random_masking`.
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
    """Mask tokens take the place of hidden patches; a small Transformer predicts pixels (section 3, "MAE decoder")."""

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
        """Those of the grid, zero for the [class] token: (1, 1 + N, E)."""
        return fixed_positions(self.grid, self.mask_token.shape[-1])

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make it a decoder of (rows, columns) of patches."""
        self.grid = grid
        self.decoder_pos_embed = self.fixed_positions().to(self.decoder_pos_embed)

    def forward(self, hidden_states: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Encoded visible patches (B, 1 + K, D) and their places (B, N) of a ``grid`` -> pixels (B, N, P P C)."""
        states = self.decoder_embed(hidden_states)  # (B, 1 + K, E)
        B, N = restore.shape
        # Under autocast the mask token, in float32, makes all tokens so, as in the encoder and transformers' ViTMAE:
        # what the blocks add up is not rounded. In a model of half precision all but the sum of positions is of that.
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
    """The masked autoencoder with its reconstruction loss."""

    _auto_class = "AutoModelForPreTraining"
    # The encoder's plans are in the configuration.
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
        """Reconstruct images (B, C, H, W) from a random part of their patches.

        Args:
            noise: (B, N), decides which patches stay visible; see `random_masking`.
            interpolate_pos_encoding: see `TfmViTEmbeddings.forward`.
            num_items_in_batch: hidden patches of the whole step, see `losses`; default, of this batch.
            return_loss: compute the loss; by this argument Trainer knows that it needs no labels.

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
        """The ``num_items_in_batch`` of a batch: hidden patches."""
        rows, columns = self.vit.embeddings.patch_embeddings.check(pixel_values)
        visible = num_visible(rows * columns, self.config.mask_ratio)
        return pixel_values.shape[0] * (rows * columns - visible)

    def reconstruction_loss(
        self, pixel_values: Tensor, logits: Tensor, mask: Tensor, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        """Mean squared error over the pixels of hidden patches, a scalar (section 3, "Reconstruction target")."""
        target = patchify(pixel_values, self.config.patch_size).float()
        if self.config.norm_pix_loss:
            target = normalize_patches(target)[0]
        loss = (logits.float() - target).square().mean(dim=-1)  # (B, N)
        return per_item((loss * mask).sum(), mask.sum(), num_items_in_batch)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        """The images with their hidden patches replaced by the prediction, in the scale of the input: (B, C, H, W).

        Normalised predictions get back mean and deviation of the true patch, as in the paper's figures.
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
