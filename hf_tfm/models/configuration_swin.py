"""Configuration of the Swin Transformer (Liu et al. 2021, arXiv:2103.14030)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_share
from .patches import sides
from .travel import READING, TravellingConfig
from .windows import FITS

# Section 3.3 of the paper.
SIZES = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
DROPOUT_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
MOST_BLOCKS = 1000  # far above the depth of real models


@strict
class TfmSwinConfig(BackboneConfigMixin, TravellingConfig):
    """Configuration of a `TfmSwinModel`. Defaults to the paper's Swin-T; fields are named as in transformers.

    Args:
        image_size: image size in pixels, a number or (height, width). No parameter depends on it.
        patch_size: patch size in pixels, a number or (height, width).
        num_channels: number of image channels.
        embed_dim: hidden size of the first stage, C; it doubles from stage to stage.
        depths: number of blocks of each stage.
        num_heads: number of attention heads of each stage, divisors of its hidden size.
        window_size: side of a window in tokens, M.
        mlp_ratio: hidden size of the MLPs divided by that of the stage.
        qkv_bias: add a bias to queries, keys and values.
        hidden_act: activation of the MLPs.
        hidden_dropout_prob: dropout rate of the patch embeddings and of every sublayer's output.
        attention_probs_dropout_prob: dropout rate of the attention probabilities.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.
        initializer_range: standard deviation of the initial weights and position biases.
        layer_norm_eps: epsilon of the layer norms.
        window_fit: how windows fit feature maps that they do not divide, or that are not larger than a window:
            "transformers" (and the authors' code), "timm" or "torchvision"; see `fit_windows`. For other feature maps,
            such as those of images of 224 pixels with the default sizes, they are the same.
        use_shift: shift the windows of every second block (section 3.2; False is the ablation of table 4).
        use_relative_position_bias: add a bias for the relative position of two tokens to their attention score
            (equation 4; False is the ablation of table 4).

    ``out_features`` and ``out_indices`` are for `TfmSwinBackbone`.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_swin"
    attribute_map: ClassVar = {
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    }
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_swin.TfmSwinConfig",
        "AutoModel": "modeling_swin.TfmSwinModel",
        "AutoModelForImageClassification": "modeling_swin.TfmSwinForImageClassification",
        "AutoBackbone": "modeling_swin.TfmSwinBackbone",
    }
    base_model_tp_plan: ClassVar = {
        "encoder.layers.*.blocks.*.mlp.fc1": "colwise",
        "encoder.layers.*.blocks.*.mlp.fc2": "rowwise",
    }
    base_model_fsdp_plan: ClassVar = {"encoder.layers.*.blocks.*": "free_full_weight"}

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    window_fit: str = "transformers"
    use_shift: bool = True
    use_relative_position_bias: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmSwinConfig":
        """Return the configuration of a named size, "tiny" to "large", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def __post_init__(self, **kwargs):
        for name in ("hidden_size", "num_layers"):  # stored in files of transformers
            given = kwargs.pop(name, None)
            if given is not None and not READING.get() and given != getattr(self, name):
                raise ValueError(f"{name} must be {getattr(self, name)}, as embed_dim and depths imply, got {given}")
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, len(self.depths) + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the last stage."""
        return self.width(len(self.depths) - 1)

    def width(self, stage: int) -> int:
        """Return the hidden size of a stage, counted from 0."""
        return self.embed_dim * 2**stage

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        require_choice(self, "hidden_act", ACT2FN)
        require_choice(self, "window_fit", FITS)
        require_at_least(self, ("num_channels", "embed_dim", "window_size"))
        require_at_least(self, ("mlp_ratio",), 1 / self.embed_dim)
        require_share(self, DROPOUT_RATES)
        for name in ("depths", "num_heads"):
            counts = getattr(self, name)
            if not counts or any(isinstance(count, bool) or count < 1 for count in counts):
                raise ValueError(f"{name} must have a positive number for every stage, got {counts}")
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths must have at most {MOST_BLOCKS} blocks in total, got {sum(self.depths)}")
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"num_heads must have a number for each of the {len(self.depths)} stages of depths, got "
                f"{self.num_heads}"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(
                    f"num_heads must divide the hidden sizes of the stages, got {heads} for {self.width(stage)}"
                )
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if (not isinstance(size, int) and len(size) != 2) or min(sides(size)) < 1:
                raise ValueError(f"{name} must be a number or a (height, width) pair of pixels, got {size}")
