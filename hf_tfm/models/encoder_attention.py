"""Other attention methods for the self-attention of an encoder, or of a decoder-only model, chosen by name.

    "clustered" + options -> a method -> set on the attention layers of the encoder -> they call it instead of SDPA

A method is an `AttentionMethod`. A layer without one computes exact attention. transformers' models reach the methods
of their layers through the attention implementation "per_module".
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_method import AttentionMethod
from .block_attention import BigBirdAttention, LocalAttention, LongformerAttention, StridedAttention
from .clustered_attention import ClusteredAttention
from .kernel_attention import LinearAttention, PerformerAttention
from .low_rank_attention import LinformerAttention, NystromAttention, SynthesizerAttention
from .lsh_attention import ReformerAttention

FULL = "full"  # exact attention, by the attention implementation of the model
PER_MODULE = "per_module"
METHODS: dict[str, type[AttentionMethod]] = {
    "linear": LinearAttention,
    "performer": PerformerAttention,
    "linformer": LinformerAttention,
    "nystrom": NystromAttention,
    "synthesizer": SynthesizerAttention,
    "local": LocalAttention,
    "strided": StridedAttention,
    "longformer": LongformerAttention,
    "bigbird": BigBirdAttention,
    "reformer": ReformerAttention,
    "clustered": ClusteredAttention,
}


def register_method(name: str, method: type[AttentionMethod]) -> None:
    """Add a method for `set_encoder_attention` and the configuration field ``encoder_attention``.

    Raises:
        ValueError: the name is taken, or the class is no `AttentionMethod`.
    """
    if not issubclass(method, AttentionMethod):
        raise ValueError(f'encoder_attention "{name}": {method.__name__} is not a subclass of AttentionMethod')
    if METHODS.get(name, method) is not method or name == FULL:
        raise ValueError(f'encoder_attention "{name}" exists already')
    METHODS[name] = method


def make_method(
    name: str, options: Mapping[str, Any] | None = None, causal: bool = False, field: str = "encoder_attention"
) -> AttentionMethod | None:
    """Return a method with its options, or None for exact attention.

    Args:
        causal: it must be able to mask later tokens.
        field: configuration field that has the name, for errors.

    Raises:
        ValueError: there is no such method, or it has no such option, or an option is out of range.
    """
    options = options or {}
    usable = [FULL, *(known for known, method in METHODS.items() if method.causal or not causal)]
    if name not in usable:
        later = ", since later tokens are masked" * (name in METHODS)
        raise ValueError(f'{field} must be one of {", ".join(usable)}{later}, got "{name}"')
    known = [] if name == FULL else [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            has = f"has the options {', '.join(known)}" if known else "has no options"
            raise ValueError(f'{field}_kwargs: "{name}" {has}, got "{option}"')
    if name == FULL:
        return None
    try:
        return METHODS[name](**options)
    except ValueError as error:
        raise ValueError(f"{field}_kwargs: {error}") from error


def method_of(config: PreTrainedConfig, causal: bool = False) -> AttentionMethod | None:
    """Return the method of a configuration: ``encoder_attention`` with its options, if causal ``decoder_attention``.

    Raises:
        ValueError: see `make_method` and `require_plain_scores`.
    """
    field = "decoder_attention" if causal else "encoder_attention"
    require_plain_scores(config, getattr(config, field), field)
    return make_method(getattr(config, field), getattr(config, f"{field}_kwargs"), causal, field)


def require_plain_scores(config: PreTrainedConfig, name: str, field: str = "encoder_attention") -> None:
    """Check that a model adds no positions to its scores, which methods do not compute.

    Raises:
        ValueError: it does, and the method ``name`` is not exact attention.
    """
    if name != FULL and getattr(config, "position_embedding_type", None) == "alibi":
        raise ValueError(f'{field} must be "{FULL}" with position_embedding_type="alibi", got "{name}"')


def set_method(layer: nn.Module, method: AttentionMethod | None, config: PreTrainedConfig) -> None:
    """Set the method of an attention layer, with new weights if it has any; None restores exact attention.

    Args:
        layer: has projections q_proj, k_proj and v_proj, and ``head_dim``.
        config: of the model.

    Raises:
        ValueError: the method has weights for each position, and the model has no maximum number of tokens.
    """
    earlier = getattr(layer, "attention_method", None)
    for trained, unused in ((True, earlier), (False, method)):
        for name in unused.unused if unused else ():
            getattr(layer, name).requires_grad_(trained)
    weights = None
    if method is not None:
        heads, length = layer.q_proj.out_features // layer.head_dim, getattr(config, "max_position_embeddings", None)
        weights = method.weights(heads, layer.head_dim, length)
    if weights is not None:
        weights.to(layer.v_proj.weight)
    layer.attention_method, layer.attention_weights = method, weights


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention layers outside of decoders and backbones: those with projections of queries, keys and
    values."""
    return [
        module
        for name, module in model.named_modules()
        if {"q_proj", "k_proj", "v_proj"} <= module._modules.keys()
        and "decoder" not in name
        and ".backbone." not in f".{name}"
        and not getattr(module, "is_causal", False)
    ]


def set_encoder_attention(model: PreTrainedModel, name: str, **options: Any) -> PreTrainedModel:
    """Choose how the encoder of a model computes self-attention, without changing any weight it has.

    Some methods have weights of their own, which are new: train the model further.

    A model of this package whose configuration has the field ``encoder_attention`` is saved with the choice. Other
    models, such as transformers' `DetrForObjectDetection`, have to be set again after loading.

    Args:
        model: changed in place.
        name: "full" (exact attention) or a method, such as "clustered".
        options: of the method.

    Returns:
        The model.

    Raises:
        ValueError: the name or an option is invalid, or the model has no such encoder.
    """
    require_plain_scores(model.config, name)
    method, layers = make_method(name, options), encoder_layers(model)
    kind = type(model).__name__
    if not layers:
        raise ValueError(f"{kind} has no encoder with self-attention over queries, keys and values")
    if method is not None and any(getattr(layer, "additive", False) for layer in layers):
        raise ValueError(f'encoder_attention "{name}" needs attention_score="dot_product", got "additive"')
    for layer in layers:
        set_method(layer, method, model.config)
    # Our layers have the attribute and call the method themselves, also those of a model's remote code.
    if not all(hasattr(type(layer), "attention_method") for layer in layers):
        # Of the model itself: a configuration of its backbone has attention of its own.
        model.set_attn_implementation({"": "sdpa" if method is None else PER_MODULE})
    elif "encoder_attention" in type(model.config).__dataclass_fields__:
        model.config.encoder_attention, model.config.encoder_attention_kwargs = name, options or None
    return model


def per_module_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by the method of a layer, or by SDPA if it has none; a transformers attention function."""
    method = getattr(module, "attention_method", None) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return method(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(PER_MODULE, per_module_attention)
AttentionMaskInterface.register(PER_MODULE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
