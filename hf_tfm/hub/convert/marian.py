"""TfmTransformer <-> transformers' Marian: the two are one architecture under two sets of names.

Marian is the post-norm Transformer with sinusoidal positions and one shared embedding (Junczys-Dowmunt et al. 2018,
arXiv:1804.00344), so it holds a `TfmTransformerForConditionalGeneration` of the paper's form, weight for weight.
"""

from transformers import MarianConfig, MarianMTModel
from transformers.activations import ACT2FN

from ...models import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from .conversion import Conversion, refuse

# Fields with one counterpart, and fields that Marian splits in two.
FIELDS = {
    "vocab_size": ("vocab_size", "decoder_vocab_size"),
    "hidden_size": ("d_model",),
    "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "num_attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
    "num_encoder_layers": ("encoder_layers",),
    "num_decoder_layers": ("decoder_layers",),
    "hidden_act": ("activation_function",),
    "max_position_embeddings": ("max_position_embeddings",),
    "dropout": ("dropout",),
    "attention_dropout": ("attention_dropout",),
    "activation_dropout": ("activation_dropout",),
    "scale_embedding": ("scale_embedding",),
    "use_cache": ("use_cache",),
    "pad_token_id": ("pad_token_id",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "decoder_start_token_id": ("decoder_start_token_id",),
}

# The one value of a field that the other side can express.
OURS_FIXED = {
    "norm_first": False,
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "sinusoidal",
    "attention_score": "dot_product",
    "decoding": "autoregressive",
    "tie_word_embeddings": True,
    "output_bias": False,
    "is_encoder_decoder": True,
}
THEIRS_FIXED = {
    "share_encoder_decoder_embeddings": True,
    "tie_word_embeddings": True,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "is_decoder": False,
    "is_encoder_decoder": True,
}

# Fields that say nothing about the outputs. They ride along as extra fields of the other configuration, so that a
# round trip gives back what it took.
OURS_CARRIED = ("label_smoothing", "initializer_factor", "mask_token_id", "max_length_offset")
THEIRS_CARRIED = ("init_std",)

TOP_NAMES = {
    "model.shared.weight": "model.shared.weight",
    "model.encoder.embedding.tokens.weight": "model.encoder.embed_tokens.weight",
    "model.decoder.embedding.tokens.weight": "model.decoder.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}
ENCODER_NAMES = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.out_proj",
    "self_attn_residual.norm": "self_attn_layer_norm",
    "feed_forward.up_proj": "fc1",
    "feed_forward.down_proj": "fc2",
    "feed_forward_residual.norm": "final_layer_norm",
}
DECODER_NAMES = {
    **ENCODER_NAMES,
    "cross_attn.q_proj": "encoder_attn.q_proj",
    "cross_attn.k_proj": "encoder_attn.k_proj",
    "cross_attn.v_proj": "encoder_attn.v_proj",
    "cross_attn.out_proj": "encoder_attn.out_proj",
    "cross_attn_residual.norm": "encoder_attn_layer_norm",
}


def names(config: TfmTransformerConfig) -> dict[str, str]:
    """Every weight of the model by its name in Marian: {ours: theirs}."""
    table = dict(TOP_NAMES)
    stacks = (
        ("encoder", config.num_encoder_layers, ENCODER_NAMES),
        ("decoder", config.num_decoder_layers, DECODER_NAMES),
    )
    for stack, layers, parts in stacks:
        for layer in range(layers):
            for ours, theirs in parts.items():
                for kind in ("weight", "bias"):
                    prefix = f"model.{stack}.layers.{layer}"
                    table[f"{prefix}.{ours}.{kind}"] = f"{prefix}.{theirs}.{kind}"
    return table


def to_marian(config: TfmTransformerConfig) -> MarianConfig:
    """The same architecture as a Marian configuration.

    Raises:
        ValueError: a field has a value that Marian cannot express.
    """
    for field, value in OURS_FIXED.items():
        if getattr(config, field) != value:
            refuse("Marian", field, getattr(config, field), value)
    if config.hidden_act not in ACT2FN:
        refuse("Marian", "hidden_act", config.hidden_act, "an activation of transformers")
    for field in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, field) is None:
            refuse("Marian", field, None, "a token id")
    fields = {theirs: getattr(config, ours) for ours, pair in FIELDS.items() for theirs in pair}
    fields.update({field: getattr(config, field) for field in OURS_CARRIED})
    fields.update({field: getattr(config, field) for field in THEIRS_CARRIED if hasattr(config, field)})
    # Marian's default, 0, would force token 0 at the greatest length; the generation configuration says what is meant.
    return MarianConfig(**fields, **THEIRS_FIXED, forced_eos_token_id=None)


def from_marian(config: MarianConfig) -> TfmTransformerConfig:
    """The same architecture as our configuration.

    Raises:
        ValueError: a field has a value that `TfmTransformerConfig` cannot express.
    """
    for field, value in THEIRS_FIXED.items():
        if getattr(config, field) != value:
            refuse("TfmTransformer", field, getattr(config, field), value)
    for first, second in (pair for pair in FIELDS.values() if len(pair) == 2):
        if getattr(config, first) != getattr(config, second):
            refuse(
                "TfmTransformer", second, getattr(config, second), f"the value of {first}, {getattr(config, first)}"
            )
    fields = {ours: getattr(config, pair[0]) for ours, pair in FIELDS.items()}
    fields.update({field: getattr(config, field) for field in OURS_CARRIED if hasattr(config, field)})
    fields.update({field: getattr(config, field) for field in THEIRS_CARRIED})
    return TfmTransformerConfig(**fields, **OURS_FIXED)


MARIAN = Conversion(
    name="marian",
    ours=TfmTransformerForConditionalGeneration,
    theirs=MarianMTModel,
    names=names,
    to_theirs=to_marian,
    to_ours=from_marian,
    # A bias on the logits; ours has none.
    zero_in_theirs=("final_logits_bias",),
    # The sinusoidal tables, which each class computes for itself.
    computed_in_theirs=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
)
