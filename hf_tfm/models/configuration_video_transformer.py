"""Configuration of the video Transformer with factorised attention over time and space."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .travel import TravellingConfig
from .video import validate_video_fields

# Our own sizes; "base" has the width and depth of ViT-B (Dosovitskiy et al. 2021, table 1).
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
LEAST_1 = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "drop_path_rate")


@strict
class TfmVideoTransformerConfig(TravellingConfig):
    """Configuration of a `TfmVideoTransformerForPrediction`.

    Args:
        hidden_size: hidden size, D; a multiple of ``num_attention_heads`` and of 4.
        num_hidden_layers: number of blocks; each attends over time, then over space.
        num_attention_heads: number of attention heads.
        intermediate_size: hidden size of the MLPs.
        hidden_act: activation of the MLPs.
        hidden_dropout_prob: dropout rate of the tokens after adding positions, and of every sublayer's output.
        attention_probs_dropout_prob: dropout rate of the attention probabilities.
        activation_dropout: dropout rate inside the MLPs.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of the layer norms.
        qkv_bias: add a bias to queries, keys and values.
        autoregressive: predict one frame after another, with causal attention over time; by default all future frames
            at once, from a token that stands for an unknown patch.
        image_size: pixels of a frame, a number or (height, width); other sizes are read too.
        patch_size: patch size in pixels, a number or (height, width).
        num_channels: channels of a frame.
        context_length: frames that are read; other numbers are read too.
        prediction_length: frames that are predicted by default.
        loss: "bce", the binary cross-entropy with pixels as probabilities, or "mse".

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_video_transformer"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_video_transformer.TfmVideoTransformerConfig",
        "AutoModel": "modeling_video_transformer.TfmVideoTransformerModel",
        "AutoModelForTimeSeriesPrediction": "modeling_video_transformer.TfmVideoTransformerForPrediction",
    }
    attribute_map: ClassVar = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
    base_model_tp_plan: ClassVar = {
        f"layers.*.{part}": "rowwise" if part.endswith(("out_proj", "down_proj")) else "colwise"
        for part in (
            *(f"{axis}_attn.{name}_proj" for axis in ("time", "space") for name in ("q", "k", "v", "out")),
            *(f"feed_forward.{name}_proj" for name in ("up", "down")),
        )
    }
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}
    norm_first: ClassVar = True
    attention_score: ClassVar = "dot_product"

    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    activation_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    autoregressive: bool = False
    image_size: int | list[int] | tuple[int, int] = 64
    patch_size: int | list[int] | tuple[int, int] = 8
    num_channels: int = 1
    context_length: int = 10
    prediction_length: int = 10
    loss: str = "bce"

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmVideoTransformerConfig":
        """Return the configuration of a named size, "tiny" to "base", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        require_choice(self, "hidden_act", ACT2FN)
        require_at_least(self, LEAST_1)
        require_share(self, RATES)
        require_multiple(self, "hidden_size", self.num_attention_heads, "num_attention_heads")
        require_multiple(self, "hidden_size", 4, "2-D sine-cosine positions")
        validate_video_fields(self)
