"""Configuration of the masked autoencoder (He et al. 2021, arXiv:2111.06377)."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .checks import require_at_least, require_multiple, require_share
from .configuration_vit import ImageEncoderConfig

DECODER_FIELDS = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)


@strict
class TfmMAEConfig(ImageEncoderConfig):
    """Configuration of a `TfmMAEForPreTraining`. Defaults to the paper's ViT-B/16 with its default decoder.

    Args:
        decoder_hidden_size: hidden size of the decoder; a multiple of ``decoder_num_attention_heads`` and of 4.
        decoder_num_hidden_layers: number of decoder blocks.
        decoder_num_attention_heads: number of attention heads of the decoder.
        decoder_intermediate_size: hidden size of the decoder's MLPs.
        mask_ratio: fraction of patches hidden from the encoder, in [0, 1).
        norm_pix_loss: predict pixels normalised over each patch (table 1d).

    The other fields are those of `ImageEncoderConfig`; position embeddings are fixed 2-D sine-cosine.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_mae"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_mae.TfmMAEConfig",
        "AutoModel": "modeling_mae.TfmMAEModel",
        "AutoModelForPreTraining": "modeling_mae.TfmMAEForPreTraining",
    }

    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False

    def validate_architecture(self) -> None:
        """See `ImageEncoderConfig`."""
        super().validate_architecture()
        require_at_least(self, DECODER_FIELDS)
        require_share(self, ("mask_ratio",))
        require_multiple(self, "decoder_hidden_size", self.decoder_num_attention_heads, "decoder_num_attention_heads")
        require_multiple(self, "decoder_hidden_size", 4, "2-D sine-cosine positions")
