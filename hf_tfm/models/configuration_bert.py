"""Configuration of BERT (Devlin et al. 2019, arXiv:1810.04805) and of its distilled variants."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .compressed import check_compressed
from .sequence_positions import check_positions
from .travel import TravellingConfig

# Base and large: Devlin et al. 2019, section 3. Tiny to medium: Turc et al. 2019 (arXiv:1908.08962), table 1.
# DistilBERT: Sanh et al. 2019 (arXiv:1910.01108), section 3. TinyBERT: Jiao et al. 2020 (arXiv:1909.10351), 4.2.
# MiniLM: Wang et al. 2020 (arXiv:2002.10957), the model of 6 layers of width 384.
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mini": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8},
    "medium": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "distilbert": {"num_hidden_layers": 6, "type_vocab_size": 0, "pooler": "none"},
    "tinybert4": {"hidden_size": 312, "intermediate_size": 1200, "num_hidden_layers": 4, "num_attention_heads": 12},
    "tinybert6": {"num_hidden_layers": 6},
    "minilm6": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
}
POOLERS = ("tanh", "relu", "tanh_relu", "none")
LEAST_1 = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
)
DROPOUT_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")


@strict
class TfmBertConfig(TravellingConfig):
    """Configuration of a `TfmBertModel`. Defaults to the paper's BERT-base; field names are those of `BertConfig`.

    Args:
        vocab_size: vocabulary size.
        hidden_size: hidden size, D; a multiple of ``num_attention_heads``.
        num_hidden_layers: number of blocks, L.
        num_attention_heads: number of attention heads.
        intermediate_size: hidden size of the feed-forward layers.
        hidden_act: activation of the feed-forward layers.
        hidden_dropout_prob: dropout rate of the embeddings and of every sublayer's output.
        attention_probs_dropout_prob: dropout rate of the attention probabilities.
        activation_dropout: dropout rate inside the feed-forward layers.
        classifier_dropout: dropout rate before a classifier; default: ``hidden_dropout_prob``.
        position_embedding_type: "learned" (BERT), "sinusoidal", "rotary" (Su et al. 2021), "alibi" (Press et al. 2022,
            with the distance |i - j|; sdpa and eager only) or "floater" (Liu et al. 2020). Sinusoids are scaled to
            ``initializer_range``, the size of the other embeddings.
        max_position_embeddings: maximum input length in tokens of "learned" positions; the others have no limit.
        floater_scope: "all" adds the solution of FLOATER's ODE to queries, keys and values, "input" to the embeddings.
        floater_step: time between two positions, the paper's Delta; an interval takes 5 Runge-Kutta steps.
        floater_hidden_size: hidden size of the ODE's vector field; default, ``hidden_size``.
        floater_adjoint: compute gradients of the ODE by the adjoint of its integrator instead of automatic
            differentiation: the same gradients in less time and memory.
        type_vocab_size: number of segment types; 0 disables segment embeddings (DistilBERT).
        encoder_attention: self-attention of the encoder: "full" (exact) or a method, see `encoder_attention.METHODS`.
        encoder_attention_kwargs: options of ``encoder_attention``, for instance {"num_features": 64}.
        layer_num_attention_heads: number of heads left in each block, each of hidden_size / num_attention_heads
            features; default, num_attention_heads in all blocks.
        layer_intermediate_sizes: hidden size of the feed-forward layer of each block; default, intermediate_size.
        low_rank: {module of the base model: rank} of the layers that are products of two matrices.
        int8: layers with int8 weights: "linear", or "all" with the embeddings; such a model cannot be trained.
        pooler: transform of the first token's state for a classifier: a linear layer with "tanh" (BERT), "relu"
            (DistilBERT's ``pre_classifier``) or both, "tanh_relu" (the TinyBERT authors' classifiers); or "none".
        training_logits: return the logits of the tokens in training too. If False, a model in training mode that is
            given ``labels`` computes the loss of the labelled tokens only and returns no logits: with transformers'
            Trainer, the output layer then reads 15 % of the tokens. Evaluation returns logits as always.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of the layer norms.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_bert"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_bert.TfmBertConfig",
        "AutoModel": "modeling_bert.TfmBertModel",
        "AutoModelForPreTraining": "modeling_bert.TfmBertForPreTraining",
        "AutoModelForMaskedLM": "modeling_bert.TfmBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_bert.TfmBertForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_bert.TfmBertForTokenClassification",
        "AutoModelForMultipleChoice": "modeling_bert.TfmBertForMultipleChoice",
        "AutoModelForQuestionAnswering": "modeling_bert.TfmBertForQuestionAnswering",
    }
    attribute_map: ClassVar = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
    base_model_tp_plan: ClassVar = {
        "embeddings.word_embeddings": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}
    # The same for every BERT; required by the blocks.
    norm_first: ClassVar = False
    attention_score: ClassVar = "dot_product"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    position_embedding_type: str = "learned"
    max_position_embeddings: int = 512
    floater_scope: str = "all"
    floater_step: float | int = 0.1
    floater_hidden_size: int | None = None
    floater_adjoint: bool = True
    type_vocab_size: int = 2
    encoder_attention: str = "full"
    encoder_attention_kwargs: dict[str, int | float | bool | str | None] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_intermediate_sizes: list[int] | None = None
    low_rank: dict[str, int] | None = None
    int8: str | None = None
    pooler: str = "tanh"
    training_logits: bool = True
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmBertConfig":
        """Return the configuration of a named size, see `SIZES`, overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    @property
    def position_scale(self) -> float:
        """Factor of sinusoidal positions, whose standard deviation is 1 / sqrt(2)."""
        return 2**0.5 * self.initializer_range

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        require_choice(self, "hidden_act", ACT2FN)
        require_choice(self, "pooler", POOLERS)
        require_at_least(self, LEAST_1)
        require_at_least(self, ("type_vocab_size",), 0)
        require_multiple(self, "hidden_size", self.num_attention_heads, "num_attention_heads")
        check_positions(self)
        check_compressed(self)
        require_share(self, DROPOUT_RATES)
        if self.classifier_dropout is not None:
            require_share(self, ("classifier_dropout",))
