"""Other attention methods for the self-attention of an encoder, chosen by name.

    "clustered" + options -> a method -> set on the attention layers of the encoder -> they call it instead of SDPA

A method is a frozen dataclass of its options that is called like an attention function of transformers, with
``output_attentions`` besides; `ClusteredAttention` is an example. A layer without one computes exact attention, and so
does a decoder. transformers' models reach the methods of their layers through the attention implementation
"per_module".
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .clustered_attention import ClusteredAttention

FULL = "full"  # exact attention, by the attention implementation of the model
PER_MODULE = "per_module"
METHODS: dict[str, type[Any]] = {"clustered": ClusteredAttention}


def register_method(name: str, method: type[Any]) -> None:
    """Add a method for `set_encoder_attention` and the configuration field ``encoder_attention``.

    Args:
        name: its name there.
        method: dataclass of its options, which validates them, with ``__call__`` as `ClusteredAttention.__call__`.

    Raises:
        ValueError: the name is taken.
    """
    if METHODS.get(name, method) is not method or name == FULL:
        raise ValueError(f'encoder_attention "{name}" exists already')
    METHODS[name] = method


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Callable | None:
    """Return a method with its options, or None for exact attention.

    Raises:
        ValueError: there is no such method, or it has no such option, or an option is out of range.
    """
    options = options or {}
    if name != FULL and name not in METHODS:
        raise ValueError(f'encoder_attention must be one of {", ".join([FULL, *METHODS])}, got "{name}"')
    known = [] if name == FULL else [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            has = f"has the options {', '.join(known)}" if known else "has no options"
            raise ValueError(f'encoder_attention_kwargs: "{name}" {has}, got "{option}"')
    if name == FULL:
        return None
    try:
        return METHODS[name](**options)
    except ValueError as error:
        raise ValueError(f"encoder_attention_kwargs: {error}") from error


def method_of(config: PreTrainedConfig) -> Callable | None:
    """Return the method of a configuration with the fields ``encoder_attention`` and ``encoder_attention_kwargs``."""
    return make_method(config.encoder_attention, config.encoder_attention_kwargs)


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
    """Choose how the encoder of a model computes self-attention, without changing any weight.

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
    method, layers = make_method(name, options), encoder_layers(model)
    kind = type(model).__name__
    if not layers:
        raise ValueError(f"{kind} has no encoder with self-attention over queries, keys and values")
    if method is not None and any(getattr(layer, "additive", False) for layer in layers):
        raise ValueError(f'encoder_attention "{name}" needs attention_score="dot_product", got "additive"')
    for layer in layers:
        layer.attention_method = method
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
