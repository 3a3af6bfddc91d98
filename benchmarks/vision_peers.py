"""The variants of the vision benchmark, their task, and the FLOPs of a step."""

import sys
from collections.abc import Callable

import timm
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmViTConfig, TfmViTForImageClassification
from hf_tfm.models.configuration_vit import SIZES
from hf_tfm.models.modeling_mae import num_visible
from hf_tfm.models.positions import sincos_2d

CLASSES = 1000

Forward = Callable[[nn.Module, Tensor], Tensor]


class Images:
    """The task of a batch {"x": pixels} for `train_step`: the model's own loss, or the loss for random labels."""

    item = term = "image"

    def __init__(self, classes: bool):
        self.classes = classes

    def count(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {"image": len(batch["x"])}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.classes:
            logits = model(pixel_values=batch["x"]).logits.float()
            return {"image": nn.functional.cross_entropy(logits, batch["y"], reduction="sum")}
        return {"image": model(pixel_values=batch["x"]).loss * len(batch["x"])}


def native_mae(size: str, image_size: int) -> ViTMAEForPreTraining:
    """transformers' masked autoencoder with position tables filled in (in 5.23 they are zeros)."""
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES[size], image_size=image_size))
    side = image_size // model.config.patch_size
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data[:, 1:] = sincos_2d(side, side, table.shape[-1])
    return model


def authors_mae(folder: str, size: str) -> nn.Module:
    """The authors' model, from a copy of facebookresearch/mae patched for current timm and numpy."""
    sys.path.insert(0, folder)
    import models_mae

    return getattr(models_mae, f"mae_vit_{size}_patch{SIZES[size].get('patch_size', 16)}")(norm_pix_loss=False)


def classifiers(size: str, image_size: int) -> dict[str, tuple[Callable[[], nn.Module], Forward]]:
    """Variants of classification: model builder, and (model, pixels) -> logits."""
    shape = {**SIZES[size], "image_size": image_size, "num_labels": CLASSES}
    timm_name = f"vit_{size}_patch{SIZES[size].get('patch_size', 16)}_224"
    return {
        "ours": (lambda: TfmViTForImageClassification(TfmViTConfig(**shape)), lambda m, x: m(pixel_values=x).logits),
        "transformers": (lambda: ViTForImageClassification(ViTConfig(**shape)), lambda m, x: m(pixel_values=x).logits),
        "timm": (lambda: timm.create_model(timm_name, img_size=image_size), lambda m, x: m(x)),
    }


def autoencoders(
    size: str, image_size: int, authors: str | None
) -> dict[str, tuple[Callable[[], nn.Module], Forward]]:
    """Variants of masked-autoencoder pretraining: model builder, and (model, pixels) -> mean loss."""
    config = TfmMAEConfig.of_size(size, image_size=image_size)
    found = {
        "ours": (lambda: TfmMAEForPreTraining(config), lambda m, x: m(pixel_values=x).loss),
        "transformers": (lambda: native_mae(size, image_size), lambda m, x: m(pixel_values=x).loss),
    }
    if authors:
        found["authors"] = (lambda: authors_mae(authors, size), lambda m, x: m(x, mask_ratio=0.75)[0])
    return found


def training_flops(config: TfmViTConfig | TfmMAEConfig, tokens: int, masked: bool) -> float:
    """Linear-layer and attention FLOPs of a training step on one image: forward, and twice that for backward."""

    def blocks(depth: int, width: int, inner: int, length: int) -> float:
        return depth * length * (4 * width * width + 2 * width * inner + 2 * length * width)

    D, patch = config.hidden_size, config.patch_size**2 * config.num_channels
    if not masked:
        shape = config.num_hidden_layers, D, config.intermediate_size
        return 6 * (tokens * patch * D + blocks(*shape, tokens + 1) + D * CLASSES)
    visible, E = num_visible(tokens, config.mask_ratio), config.decoder_hidden_size
    encoder = visible * patch * D + blocks(config.num_hidden_layers, D, config.intermediate_size, visible + 1)
    decoder = blocks(config.decoder_num_hidden_layers, E, config.decoder_intermediate_size, tokens + 1)
    return 6 * (encoder + (visible + 1) * D * E + decoder + tokens * E * patch)
