"""Configuration of the encoder of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .travel import TravellingConfig

# "tiny" is ours; the others are the configurations of the authors' code for the full Transformer, one a task.
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "listops": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
    "text": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    "retrieval": {
        **{"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        "matching": True,
    },
    "image": {
        **{"hidden_size": 128, "qkv_size": 64, "intermediate_size": 128, "num_hidden_layers": 1},
        **{"num_attention_heads": 8, "position_embedding_type": "learned"},
        **{"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
    },
    "pathfinder": {
        **{"hidden_size": 32, "qkv_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "position_embedding_type": "learned", "pooling": "mean"},
    },
}
LEAST_1 = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
)
DROPOUT_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")


@strict
class TfmLongRangeConfig(TravellingConfig):
    """Configuration of a `TfmLongRangeModel`.

    Args:
        vocab_size: vocabulary size; 257 for bytes and padding.
        hidden_size: hidden size, D.
        qkv_size: size of queries, keys and values of all heads together, a multiple of ``num_attention_heads``;
            default: ``hidden_size``.
        num_hidden_layers: number of pre-norm blocks.
        num_attention_heads: number of attention heads.
        intermediate_size: hidden size of the feed-forward layers and of the classifier.
        hidden_act: activation of the feed-forward layers.
        hidden_dropout_prob: dropout rate of the embeddings and of every sublayer's output.
        attention_probs_dropout_prob: dropout rate of the attention probabilities.
        activation_dropout: dropout rate inside the feed-forward layers.
        max_position_embeddings: maximum input length in tokens, with the class token.
        position_embedding_type: "sinusoidal", "learned" or "rotary".
        pooling: representation of a sequence: that of a class token before it ("cls"), or the mean of its tokens
            ("mean").
        matching: classify pairs of sequences, each encoded by itself: [a, b, a b, a - b] of their representations.
        encoder_attention: self-attention: "full" (exact) or a method, see `encoder_attention.METHODS`.
        encoder_attention_kwargs: options of ``encoder_attention``, for instance {"num_features": 64}.
        initializer_range: standard deviation of the initial token embeddings and learned positions.
        layer_norm_eps: epsilon of the layer norms.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_long_range"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_long_range.TfmLongRangeConfig",
        "AutoModel": "modeling_long_range.TfmLongRangeModel",
        "AutoModelForSequenceClassification": "modeling_long_range.TfmLongRangeForSequenceClassification",
    }
    attribute_map: ClassVar = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
    # The same for every model; required by the blocks. The authors' projections have no biases.
    base_model_tp_plan: ClassVar = {
        "word_embeddings": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}
    norm_first: ClassVar = True
    attention_score: ClassVar = "dot_product"
    qkv_bias: ClassVar = False
    position_scale: ClassVar = 1.0  # of sinusoidal positions

    vocab_size: int = 257
    hidden_size: int = 256
    qkv_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    activation_dropout: float | int = 0.1
    max_position_embeddings: int = 1025
    position_embedding_type: str = "sinusoidal"
    pooling: str = "cls"
    matching: bool = False
    encoder_attention: str = "full"
    encoder_attention_kwargs: dict[str, int | float | bool | str | None] | None = None
    initializer_range: float = 1.0
    layer_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmLongRangeConfig":
        """Return the configuration of a named size, see `SIZES`, overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        require_choice(self, "hidden_act", ACT2FN)
        require_choice(self, "position_embedding_type", ("sinusoidal", "learned", "rotary"))
        require_choice(self, "pooling", ("cls", "mean"))
        require_at_least(self, LEAST_1)
        if self.qkv_size is not None:
            require_at_least(self, ("qkv_size",))
        name = "hidden_size" if self.qkv_size is None else "qkv_size"
        require_multiple(self, name, self.num_attention_heads, "num_attention_heads")
        require_share(self, DROPOUT_RATES)
