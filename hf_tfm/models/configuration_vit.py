"""Configuration of the Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

from typing import Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .compressed import check_compressed
from .patches import patch_grid, sides
from .travel import TravellingConfig

# Base, large and huge: table 1 of the paper (huge with 14 x 14 patches). Tiny and small: Touvron et al. 2021
# (DeiT, arXiv:2012.12877), table 1.
SIZES = {
    "tiny": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "huge": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}

Config = TypeVar("Config", bound="ImageEncoderConfig")
DROPOUT_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "drop_path_rate")
LEAST_1 = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")


@strict
class ImageEncoderConfig(TravellingConfig):
    """Base configuration of Vision Transformer encoders, extended by `TfmViTConfig` and `TfmMAEConfig`.

    Args:
        hidden_size: hidden size, D; a multiple of ``num_attention_heads``.
        num_hidden_layers: number of blocks, L.
        num_attention_heads: number of attention heads.
        intermediate_size: hidden size of the MLPs.
        hidden_act: activation of the MLPs.
        hidden_dropout_prob: dropout rate of the tokens after adding positions, and of every sublayer's output.
        attention_probs_dropout_prob: dropout rate of the attention probabilities.
        activation_dropout: dropout rate inside the MLPs.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of the layer norms.
        image_size: image size in pixels that the position embeddings are defined for, a number or (height, width).
        patch_size: patch size in pixels, a number or (height, width); with a ``backbone``, in feature-map cells.
        num_channels: number of image channels.
        qkv_bias: add a bias to queries, keys and values.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    attribute_map: ClassVar = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
    base_model_tp_plan: ClassVar = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}
    # The same for every Vision Transformer; required by the blocks.
    norm_first: ClassVar = True
    attention_score: ClassVar = "dot_product"
    # Defaults that a model family can turn into fields.
    position_embedding_type: ClassVar = "sincos_2d"
    backbone: ClassVar = None

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    activation_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True

    @classmethod
    def of_size(cls: type[Config], size: str, **fields: Any) -> Config:
        """Return the configuration of a named size, "tiny" to "huge", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        require_choice(self, "hidden_act", ACT2FN)
        require_at_least(self, LEAST_1)
        require_share(self, DROPOUT_RATES)
        require_multiple(self, "hidden_size", self.num_attention_heads, "num_attention_heads")
        parts = {"learned_2d": 2, "sincos_2d": 4}.get(self.position_embedding_type, 1)
        require_multiple(self, "hidden_size", parts, f'position_embedding_type="{self.position_embedding_type}"')
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if (not isinstance(size, int) and len(size) != 2) or min(sides(size)) < 1:
                raise ValueError(f"{name} must be a number or a (height, width) pair of pixels, got {size}")
        if self.backbone is None:
            patch_grid(*sides(self.image_size), self.patch_size, "image_size")


@strict
class TfmViTConfig(BackboneConfigMixin, ImageEncoderConfig):
    """Configuration of a `TfmViTModel`. Defaults to the paper's ViT-B/16.

    Args:
        position_embedding_type: "learned" (one vector per patch, the paper), "learned_2d" (half a vector per row and
            half per column; appendix D.4) or "sincos_2d" (fixed).
        pooling: image representation: the "cls" token, or the "mean" of the patches, normalised after pooling.
        representation_layer: add a linear layer with an activation before the classifier, as in the paper's
            pre-training.
        pooler_output_size: output size of the representation layer; default: ``hidden_size``.
        pooler_act: activation of the representation layer.
        backbone: name of a timm model whose feature map replaces the pixels (the paper's hybrid); its batch norms are
            replaced by group norms.
        backbone_out_index: index of the backbone's feature map to use.
        distillation_token: add a second token, between the class token and the patches, with its own classifier that
            is trained on a teacher's predictions (Touvron et al. 2021, arXiv:2012.12877, section 4).
        encoder_attention: self-attention of the encoder: "full" (exact) or a method, see `encoder_attention.METHODS`.
        encoder_attention_kwargs: options of ``encoder_attention``, for instance {"num_features": 64}.
        layer_num_attention_heads: number of heads left in each block, each of hidden_size / num_attention_heads
            features; default, num_attention_heads in all blocks.
        layer_intermediate_sizes: hidden size of the feed-forward layer of each block; default, intermediate_size.
        low_rank: {module of the base model: rank} of the layers that are products of two matrices.
        int8: layers with int8 weights: "linear", or "all" with the embeddings; such a model cannot be trained.

    The other fields are those of `ImageEncoderConfig`; ``out_features`` and ``out_indices`` are for `TfmViTBackbone`.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_vit"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_vit.TfmViTConfig",
        "AutoModel": "modeling_vit.TfmViTModel",
        "AutoModelForImageClassification": "modeling_vit.TfmViTForImageClassification",
        "AutoBackbone": "modeling_vit.TfmViTBackbone",
    }

    position_embedding_type: str = "learned"
    pooling: str = "cls"
    representation_layer: bool = False
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    backbone: str | None = None
    backbone_out_index: int = -1
    distillation_token: bool = False
    encoder_attention: str = "full"
    encoder_attention_kwargs: dict[str, int | float | bool | str | None] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_intermediate_sizes: list[int] | None = None
    low_rank: dict[str, int] | None = None
    int8: str | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.pooler_output_size = self.pooler_output_size or self.hidden_size
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """See `ImageEncoderConfig`."""
        require_choice(self, "position_embedding_type", ("learned", "learned_2d", "sincos_2d"))
        require_choice(self, "pooling", ("cls", "mean"))
        require_choice(self, "pooler_act", ACT2FN)
        if self.distillation_token and (self.pooling != "cls" or self.representation_layer):
            raise ValueError(
                'distillation_token needs pooling "cls" and no representation_layer: its classifier reads '
                f'that token, got "{self.pooling}" and {self.representation_layer}'
            )
        super().validate_architecture()
        check_compressed(self)
