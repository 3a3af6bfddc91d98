"""TfmTransformer <-> transformers' Marian (post-norm) and Pegasus (pre-norm): the same architecture, other names.

Both are the Transformer with sinusoidal positions and one shared embedding. Marian (Junczys-Dowmunt et al. 2018,
arXiv:1804.00344) has the paper's form; Pegasus (Zhang et al. 2020, arXiv:1912.08777) applies norms before each
sublayer and once more at the end of each stack. Each therefore represents a `TfmTransformerForConditionalGeneration`
weight for weight.
"""

from dataclasses import dataclass
from typing import Any

from transformers import (
    MarianMTModel,
    PegasusForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from ..models.configuration_transformer import TfmTransformerConfig
from ..models.modeling_transformer import TfmTransformerForConditionalGeneration
from .conversion import Conversion, refuse

# Fields with one counterpart, and fields that the other configurations split in two.
FIELDS = {
    "vocab_size": ("vocab_size",),
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

# Fields for which the other side supports only one value.
OURS_FIXED = {
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "sinusoidal",
    "attention_score": "dot_product",
    "decoding": "autoregressive",
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
}
THEIRS_FIXED = {
    "tie_word_embeddings": True,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "is_decoder": False,
    "is_encoder_decoder": True,
}

# Fields that do not affect the outputs are carried along as extra fields of the other configuration, so that a round
# trip is lossless.
OURS_CARRIED = ("label_smoothing", "initializer_factor", "mask_token_id", "max_length_offset")
THEIRS_CARRIED = ("init_std",)

TOP_NAMES = {
    "model.shared.weight": "model.shared.weight",
    "model.encoder.embedding.tokens.weight": "model.encoder.embed_tokens.weight",
    "model.decoder.embedding.tokens.weight": "model.decoder.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}
BIAS_NAME = {"lm_head.bias": "final_logits_bias"}
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
    """Map every weight of the model to its name in both stock classes: {ours: theirs}."""
    modules = {}
    stacks = (
        ("model.encoder", config.num_encoder_layers, ENCODER_NAMES),
        ("model.decoder", config.num_decoder_layers, DECODER_NAMES),
    )
    for stack, layers, parts in stacks:
        for layer in range(layers):
            modules.update({f"{stack}.layers.{layer}.{o}": f"{stack}.layers.{layer}.{t}" for o, t in parts.items()})
        if config.norm_first:
            modules[f"{stack}.norm"] = f"{stack}.layer_norm"
    table = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    return {**TOP_NAMES, **(BIAS_NAME if config.output_bias else {}), **table}


@dataclass(frozen=True)
class StockClass:
    """One of the two stock classes, and its differences from the other.

    Args:
        name: user-facing name, as in ``--to marian``.
        model: model class with an output layer.
        norm_first: True for pre-norm.
        other: name of the class with the other norm placement.
        fields: {our field: its fields}.
        fixed: {its field: the only value that we can express}.
    """

    name: str
    model: type[PreTrainedModel]
    norm_first: bool
    other: str
    fields: dict[str, tuple[str, ...]]
    fixed: dict[str, Any]

    def to_theirs(self, config: TfmTransformerConfig) -> PreTrainedConfig:
        """Convert our configuration to that of this class.

        Raises:
            ValueError: a field has a value that the class cannot express.
        """
        if config.norm_first != self.norm_first:
            raise ValueError(f"{self.name} cannot express norm_first={config.norm_first}: convert to {self.other}")
        for field, value in OURS_FIXED.items():
            if getattr(config, field) != value:
                refuse(self.name, field, getattr(config, field), value)
        if config.hidden_act not in ACT2FN:
            refuse(self.name, "hidden_act", config.hidden_act, "an activation of transformers")
        for field in ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, field) is None:
                refuse(self.name, field, None, "a token id")
        fields = {theirs: getattr(config, ours) for ours, pair in self.fields.items() for theirs in pair}
        fields.update({field: getattr(config, field) for field in OURS_CARRIED})
        fields.update({field: getattr(config, field) for field in THEIRS_CARRIED if hasattr(config, field)})
        # Their default forces a token at the maximum length; the generation configuration has the intended value.
        return self.model.config_class(**fields, **self.fixed, forced_eos_token_id=None)

    def to_ours(self, model: PreTrainedModel) -> TfmTransformerConfig:
        """Convert the configuration of ``model``, of this class, to ours.

        Raises:
            ValueError: a field has a value that `TfmTransformerConfig` cannot express.
        """
        config, target = model.config, TfmTransformerConfig.__name__
        for field, value in self.fixed.items():
            if getattr(config, field) != value:
                refuse(target, field, getattr(config, field), value)
        for first, second in (pair for pair in self.fields.values() if len(pair) == 2):
            if getattr(config, first) != getattr(config, second):
                refuse(target, second, getattr(config, second), f"the value of {first}, {getattr(config, first)}")
        # Pegasus has no beginning-of-sentence token, unless one of ours was carried along.
        fields = {ours: getattr(config, pair[0], None) for ours, pair in self.fields.items()}
        fields.update({field: getattr(config, field) for field in OURS_CARRIED if hasattr(config, field)})
        fields.update({field: getattr(config, field) for field in THEIRS_CARRIED})
        # Every model has the bias, and the configuration does not record whether it was trained.
        output_bias = bool(model.final_logits_bias.any())
        return TfmTransformerConfig(**fields, **OURS_FIXED, norm_first=self.norm_first, output_bias=output_bias)

    def conversion(self) -> Conversion:
        """Create the conversion between our class and this one."""
        return Conversion(
            name=self.name,
            ours=TfmTransformerForConditionalGeneration,
            theirs=self.model,
            names=names,
            to_theirs=self.to_theirs,
            to_ours=self.to_ours,
            zero_in_theirs=tuple(BIAS_NAME.values()),
            # Sinusoidal tables, which each class computes itself.
            computed_in_theirs=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
        )


MARIAN_CLASS = StockClass(
    name="marian",
    model=MarianMTModel,
    norm_first=False,
    other="pegasus",
    fields={**FIELDS, "vocab_size": ("vocab_size", "decoder_vocab_size")},
    fixed={**THEIRS_FIXED, "share_encoder_decoder_embeddings": True},
)
PEGASUS_CLASS = StockClass(
    name="pegasus",
    model=PegasusForConditionalGeneration,
    norm_first=True,
    other="marian",
    fields=FIELDS,
    fixed=THEIRS_FIXED,
)
MARIAN, PEGASUS = MARIAN_CLASS.conversion(), PEGASUS_CLASS.conversion()
CONVERSIONS = (MARIAN, PEGASUS)
