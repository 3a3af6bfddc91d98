"""Configuration of the encoder-decoder Transformer (Vaswani et al. 2017, arXiv:1706.03762)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .sequence_positions import check_positions
from .travel import TravellingConfig

# Table 3 of the paper ("base", "big"); "tiny" is the small-data size of Wu et al. 2021 (arXiv:2105.14462, sec. 4.2).
SIZES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_encoder_layers": 4,
        "num_decoder_layers": 4,
        "dropout": 0.3,
    },
    "base": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_encoder_layers": 6,
        "num_decoder_layers": 6,
        "dropout": 0.1,
    },
    "big": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_encoder_layers": 6,
        "num_decoder_layers": 6,
        "dropout": 0.3,
    },
}

CHOICES = {
    "attention_score": ("dot_product", "additive"),
    "decoding": ("autoregressive", "mask_predict"),
    "hidden_act": ACT2FN,
}
LEAST_1 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "max_position_embeddings",
)


@strict
class TfmTransformerConfig(TravellingConfig):
    """Configuration of a `TfmTransformerModel`. Defaults to the paper's base model.

    Args:
        vocab_size: size of the vocabulary shared by source and target.
        hidden_size: hidden size, the paper's d_model; a multiple of ``num_attention_heads``.
        intermediate_size: hidden size of the feed-forward layers, d_ff.
        num_attention_heads: number of attention heads, h.
        num_encoder_layers: number of encoder blocks, N.
        num_decoder_layers: number of decoder blocks, N.
        hidden_act: activation of the feed-forward layers; "relu" in the paper.
        norm_first: apply layer norm before each sublayer (pre-norm) instead of after the residual sum (post-norm, the
            paper).
        layer_norm_eps: epsilon of the layer norms.
        position_embedding_type: "sinusoidal" (the paper), "learned" (up to ``max_position_embeddings``), "rotary" (Su
            et al. 2021), "alibi" (Press et al. 2022; sdpa and eager only) or "floater" (Liu et al. 2020).
        max_position_embeddings: number of positions in the table of "learned"; the others have no limit.
        floater_scope: "all" adds the solution of FLOATER's ODE to queries, keys and values of every attention,
            "input" to the embeddings.
        floater_step: time between two positions, the paper's Delta; an interval takes 5 Runge-Kutta steps.
        floater_hidden_size: hidden size of the ODE's vector field; default, ``hidden_size``.
        floater_adjoint: compute gradients of the ODE by the adjoint of its integrator instead of automatic
            differentiation: the same gradients in less time and memory.
        attention_score: "dot_product" (the paper) or "additive" (Bahdanau et al. 2015; eager only).
        encoder_attention: self-attention of the encoder: "full" (exact) or a method, see `encoder_attention.METHODS`.
        encoder_attention_kwargs: options of ``encoder_attention``, for instance {"num_features": 64}.
        decoding: "autoregressive" (left to right), or "mask_predict" (all tokens in parallel, then refined;
            Ghazvininejad et al. 2019, arXiv:1904.09324).
        max_length_offset: maximum difference in tokens between the predicted target length and the source length;
            "mask_predict" only.
        dropout: dropout rate of the embeddings and of every sublayer's output, P_drop.
        attention_dropout: dropout rate of the attention probabilities.
        activation_dropout: dropout rate inside the feed-forward layers.
        label_smoothing: label smoothing of the loss returned by ``forward(labels=...)``, epsilon_ls.
        scale_embedding: multiply embeddings by sqrt(hidden_size) (section 3.4).
        initializer_factor: scale of the initial weights.
        tie_word_embeddings: share one matrix between source, target and output embeddings (section 3.4).
        output_bias: add a learned bias to the logits; the paper has none.
        mask_token_id: id of the token that marks positions still to be predicted; "mask_predict" only.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_transformer"
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values"]
    attribute_map: ClassVar = {
        "d_model": "hidden_size",
        "num_hidden_layers": "num_decoder_layers",
        "encoder_layers": "num_encoder_layers",
    }
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_transformer.TfmTransformerConfig",
        "AutoModel": "modeling_transformer.TfmTransformerModel",
        "AutoModelForSeq2SeqLM": "modeling_transformer.TfmTransformerForConditionalGeneration",
    }
    base_model_tp_plan: ClassVar = {
        "shared": "embedding_rowwise",
        "encoder.embedding.tokens": "embedding_rowwise",
        "decoder.embedding.tokens": "embedding_rowwise",
        **{
            f"{name}.{projection}": "rowwise" if projection in ("out_proj", "down_proj") else "colwise"
            for name, projections in {
                "encoder.layers.*.self_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
                "encoder.layers.*.feed_forward": ("up_proj", "down_proj"),
                "decoder.layers.*.self_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
                "decoder.layers.*.cross_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
                "decoder.layers.*.feed_forward": ("up_proj", "down_proj"),
            }.items()
            for projection in projections
        },
    }
    position_scale: ClassVar = 1.0  # of sinusoidal positions
    base_model_fsdp_plan: ClassVar = {
        "encoder.layers.*": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
    }

    vocab_size: int = 37000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    hidden_act: str = "relu"
    norm_first: bool = False
    layer_norm_eps: float = 1e-5
    position_embedding_type: str = "sinusoidal"
    max_position_embeddings: int = 1024
    floater_scope: str = "all"
    floater_step: float | int = 0.1
    floater_hidden_size: int | None = None
    floater_adjoint: bool = True
    attention_score: str = "dot_product"
    encoder_attention: str = "full"
    encoder_attention_kwargs: dict[str, int | float | bool | str | None] | None = None
    decoding: str = "autoregressive"
    max_length_offset: int = 64
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    label_smoothing: float | int = 0.1
    scale_embedding: bool = True
    initializer_factor: float | int = 1.0
    tie_word_embeddings: bool = True
    output_bias: bool = False
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    mask_token_id: int | None = 4
    decoder_start_token_id: int | None = 1

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmTransformerConfig":
        """Return the configuration of a named size, "tiny", "base" or "big", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        for name, choices in CHOICES.items():
            require_choice(self, name, choices)
        require_at_least(self, LEAST_1)
        require_at_least(self, ("max_length_offset",), 0)
        require_multiple(self, "hidden_size", self.num_attention_heads, "num_attention_heads")
        check_positions(self)
        require_share(self, ("dropout", "attention_dropout", "activation_dropout", "label_smoothing"))
        if self.decoding == "mask_predict":
            if self.mask_token_id is None:
                raise ValueError('decoding="mask_predict" needs mask_token_id, got None')
            if not 0 <= self.mask_token_id < self.vocab_size:
                raise ValueError(
                    f"mask_token_id must be in [0, vocab_size = {self.vocab_size}), got {self.mask_token_id}"
                )
