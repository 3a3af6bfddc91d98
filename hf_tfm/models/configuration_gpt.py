"""Configuration of GPT (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"; 2019,
"Language Models are Unsupervised Multitask Learners")."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .travel import TravellingConfig

# GPT-1: Radford et al. 2018, section 4.1. GPT-2: Radford et al. 2019, table 2.
SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256},
    "gpt1": {
        "norm_first": False,
        "vocab_size": 40478,
        "max_position_embeddings": 512,
        "classifier_dropout": 0.1,
        "bos_token_id": None,  # no special tokens in the vocabulary
        "eos_token_id": None,
    },
    "small": {},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "large": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "xl": {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25},
}
# Field names of transformers' `GPT2Config`.
NATIVE_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
    "layer_norm_epsilon": "layer_norm_eps",
}
LEAST_1 = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
)
DROPOUT_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "classifier_dropout")


@strict
class TfmGPTConfig(TravellingConfig):
    """Configuration of a `TfmGPTModel`. Defaults to the smallest GPT-2.

    Args:
        vocab_size: vocabulary size.
        hidden_size: hidden size, D; a multiple of ``num_attention_heads``.
        num_hidden_layers: number of blocks, L.
        num_attention_heads: number of attention heads.
        intermediate_size: hidden size of the feed-forward layers; default: 4 D.
        hidden_act: activation of the feed-forward layers; "gelu_new" is the authors' approximation of GELU.
        hidden_dropout_prob: dropout rate of the embeddings and of every sublayer's output.
        attention_probs_dropout_prob: dropout rate of the attention probabilities.
        activation_dropout: dropout rate inside the feed-forward layers.
        classifier_dropout: dropout rate before a classifier (2018, section 4.1: 0.1); transformers' GPT-2 has none.
        max_position_embeddings: maximum input length in tokens.
        decoder_attention: self-attention: "full" (exact), or a method that masks later tokens, such as "linear",
            "performer" and "local"; see `encoder_attention.METHODS`.
        decoder_attention_kwargs: options of ``decoder_attention``, for instance {"block_size": 64}.
        norm_first: use pre-norm blocks and a final norm (GPT-2) instead of post-norm blocks (GPT-1).
        initializer_range: standard deviation of the initial weights; in pre-norm models the last layer of each
            residual branch is scaled down by sqrt(2 L) (2019, section 2.3).
        layer_norm_eps: epsilon of the layer norms.
        use_cache: cache keys and values of earlier tokens during generation.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_gpt"
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values"]
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_gpt.TfmGPTConfig",
        "AutoModel": "modeling_gpt.TfmGPTModel",
        "AutoModelForCausalLM": "modeling_gpt.TfmGPTForCausalLM",
        "AutoModelForSequenceClassification": "modeling_gpt.TfmGPTForSequenceClassification",
    }
    attribute_map: ClassVar = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
    # Applies to checkpoints with this package's weight names; GPT-2's matrices would be sharded before the transpose.
    base_model_tp_plan: ClassVar = {
        "wte": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}
    attention_score: ClassVar = "dot_product"  # the same for every GPT; required by the blocks

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    max_position_embeddings: int = 1024
    decoder_attention: str = "full"
    decoder_attention_kwargs: dict[str, int | float | bool | str | None] | None = None
    norm_first: bool = True
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmGPTConfig":
        """Return the configuration of a named size, see `SIZES`, overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def __post_init__(self, **kwargs):
        for native, name in NATIVE_FIELDS.items():
            if native in kwargs:
                setattr(self, name, kwargs.pop(native))
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        require_choice(self, "hidden_act", ACT2FN)
        require_at_least(self, LEAST_1)
        require_multiple(self, "hidden_size", self.num_attention_heads, "num_attention_heads")
        require_share(self, DROPOUT_RATES)
