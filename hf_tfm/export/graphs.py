"""Graphs of a model for export: modules with named tensors as inputs and outputs, and which of their axes may vary.

model -> [`Graph`]: one for a single forward pass; for text generation an encoder, if there is one, and a decoder that
takes and returns the cache

Shapes: B rows; S source, T new, P cached positions; H heads; Dh size of a head; L decoder layers.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..conversion.parity import OUTPUTS, fixed_images, fixed_photos, random_batch
from ..models.cache_names import CACHE_NAME
from ..models.modeling_rnn_seq2seq import packed
from ..models.patches import sides
from ..models.recurrent_cache import RecurrentCache

# Reasons why models of a type cannot be exported, by format or for all of them.
REFUSED = {
    ("tfm_faster_rcnn", None): "the number of detections depends on the image, because overlapping boxes are removed, "
    "and a graph of torch.export cannot express that",
    (
        "tfm_rnn_seq2seq",
        "openvino",
    ): "the exporter has no recurrent layer for variable lengths; OpenVINO reads the files of --to onnx",
    ("tfm_rnn_seq2seq", "executorch"): "the runtime has no recurrent layer for variable lengths",
}
ABOVE = frozenset(OUTPUTS) - {"last_hidden_state", "pooler_output", "loss"}  # outputs of heads
PAST, PRESENT, MEMORY = "past_", "present_", "memory_"
SEED = 0
LENGTHS = (9, 4, 7)  # tokens of the rows of the example inputs
NEW, CACHED = 4, 5  # new and cached tokens of a decoder's example
UNIT = 16  # of the sides of example images of models without a fixed size


@dataclass
class Graph:
    """A module to export.

    Args:
        name: of its file.
        module: takes the inputs by name and returns {name: tensor}.
        inputs: an example, with more than one row, token and so on, because torch.export fixes axes of size 1.
        axes: names of the axes that may vary, by input and dimension.
        limits: most entries along an axis, by name of the axis.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    limits: dict[str, int] = field(default_factory=dict)


class Forward(nn.Module):
    """Forward pass of a model, with the tensors of its output."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the model's output by name, except losses and states below a head."""
        output = self.model(**inputs, **self.options, return_dict=True)
        maps = {f"feature_map_{i}": value for i, value in enumerate(output.get("feature_maps", ()))}  # of a backbone
        found = maps | {name: value for name, value in output.items() if isinstance(value, Tensor) and name != "loss"}
        has_head = not found.keys().isdisjoint(ABOVE - {"mask"})
        return {name: value for name, value in found.items() if name in ABOVE or not has_head}


class Decoder(nn.Module):
    """Decoder-only language model with a cache.

    Keys and values of layer i are the inputs ``past_key_i`` and ``past_value_i``, (B, H, P, Dh), empty for P = 0, and
    the outputs ``present_key_i`` and ``present_value_i``, (B, H, P + T, Dh).
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **past: Tensor) -> dict[str, Tensor]:
        """Compute ``logits`` (B, T, V) of ids (B, T); the mask (B, P + T) is 0 at padding, on any side."""
        cache = filled(DynamicCache(), past, PAST)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)[:, cache.get_seq_length() :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            **{CACHE_NAME: cache},
            use_cache=True,
        )
        return {"logits": output.logits, **emptied(output[CACHE_NAME], PRESENT)}


class Encoder(nn.Module):
    """Encoder of a Transformer, with keys and values of the decoder's cross-attention."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Encode ids (B, S): ``memory_key_i`` and ``memory_value_i``, (B, H, S, Dh), of every decoder layer i."""
        memory = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # A pass over one token fills the cache. What else it computes is no output and therefore not in the graph.
        self.model.get_decoder()(
            input_ids=input_ids[:, :1],
            encoder_hidden_states=memory,
            encoder_attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            use_cache=True,
        )
        return emptied(cache.cross_attention_cache, MEMORY)


class CrossDecoder(nn.Module):
    """Decoder of a Transformer, with a cache as of `Decoder` and what `Encoder` returns."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, attention_mask: Tensor, **caches: Tensor) -> dict[str, Tensor]:
        """Compute ``logits`` (B, T, V) of target ids (B, T); the mask (B, S) is that of the source."""
        cache = EncoderDecoderCache(filled(DynamicCache(), caches, PAST), filled(DynamicCache(), caches, MEMORY))
        cache.is_updated = dict.fromkeys(cache.is_updated, True)
        keys = caches[f"{MEMORY}key_0"]
        output = self.model(
            decoder_input_ids=decoder_input_ids,
            attention_mask=attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=keys[:, 0]),  # only its shape is read
            **{CACHE_NAME: cache},
            use_cache=True,
        )
        return {"logits": output.logits, **emptied(output[CACHE_NAME].self_attention_cache, PRESENT)}


class RecurrentEncoder(nn.Module):
    """Encoder of a recurrent model, with what its decoder reads."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Encode ids (B, S): ``memory`` (B, S, 2E), ``memory_key_0`` and ``memory_value_0``, which attention reads,
        and ``present_key_0`` (B, L, D), with ``present_value_0`` of LSTMs, the decoder's first state.
        """
        memory = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        decoder, cache = self.model.get_decoder(), EncoderDecoderCache(RecurrentCache(), DynamicCache())
        decoder.of_memory(memory, attention_mask, cache)
        states = packed(decoder.initial_states(memory, attention_mask, memory.shape[0]))
        cache.self_attention_cache.update(*states, 0)
        return {
            "memory": memory,
            **emptied(cache.cross_attention_cache, MEMORY),
            **emptied(cache.self_attention_cache, PRESENT),
        }


class RecurrentDecoder(nn.Module):
    """One step of a recurrent decoder."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, decoder_input_ids: Tensor, attention_mask: Tensor, memory: Tensor, **caches: Tensor
    ) -> dict[str, Tensor]:
        """Compute ``logits`` (B, 1, V) of target ids (B, 1), and the next state."""
        cache = EncoderDecoderCache(RecurrentCache(), DynamicCache())
        hidden = caches[f"{PAST}key_0"]
        cache.self_attention_cache.update(hidden, caches.get(f"{PAST}value_0", hidden[:, :0]), 0)
        keys = caches[f"{MEMORY}key_0"]
        cache.cross_attention_cache.update(keys, caches.get(f"{MEMORY}value_0", keys[..., :0]), 0)
        cache.is_updated[0] = True
        output = self.model(
            decoder_input_ids=decoder_input_ids,
            attention_mask=attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            **{CACHE_NAME: cache},
            use_cache=True,
        )
        return {"logits": output.logits, **emptied(output[CACHE_NAME].self_attention_cache, PRESENT)}


class LengthEncoder(nn.Module):
    """Encoder of a mask-predict model, with its scores of target lengths."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Encode ids (B, S): ``memory`` (B, S, D), and ``length_logits`` (B, 2 m + 1) of the target's length minus the
        source's, from -m to m = ``max_length_offset``.
        """
        memory = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"memory": memory, "length_logits": self.model.length_head(memory, attention_mask)[0]}


class MaskDecoder(nn.Module):
    """Decoder of a mask-predict model, without a cache."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, decoder_input_ids: Tensor, decoder_attention_mask: Tensor, attention_mask: Tensor, memory: Tensor
    ) -> dict[str, Tensor]:
        """Compute ``logits`` (B, T, V) of target ids (B, T), of which some are ``mask_token_id``."""
        output = self.model(
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            attention_mask=attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
        )
        return {"logits": output.logits}


def filled(cache: Cache, tensors: dict[str, Tensor], prefix: str) -> Cache:
    """Put the tensors ``{prefix}key_i`` and ``{prefix}value_i`` into an empty cache."""
    for i in range(sum(name.startswith(f"{prefix}key_") for name in tensors)):
        cache.update(tensors[f"{prefix}key_{i}"], tensors[f"{prefix}value_{i}"], i)
    return cache


def emptied(cache: Cache, prefix: str) -> dict[str, Tensor]:
    """Return keys and values of a cache by name, the inverse of `filled`, except for parts without entries."""
    found = {}
    for i, layer in enumerate(cache.layers):
        found |= {f"{prefix}key_{i}": layer.keys, f"{prefix}value_{i}": layer.values}
    return {name: value for name, value in found.items() if 0 not in value.shape[1:]}


def reason_against(model_type: str, to: str) -> str | None:
    """Return why models of a type cannot be exported to a format; None if they can."""
    return REFUSED.get((model_type, None), REFUSED.get((model_type, to)))


def graphs_of(model: PreTrainedModel, to: str, segments: bool = True) -> list[Graph]:
    """Return the graphs of a model in evaluation mode, in the order in which they run.

    Args:
        to: name of the format.
        segments: False for a tokenizer without ``token_type_ids``, which are then no input.

    Raises:
        ValueError: models of this type cannot be exported to it.
    """
    config = model.config
    if reason := reason_against(config.model_type, to):
        raise ValueError(f"{type(model).__name__} cannot be exported to {to}: {reason}")
    if not (model.can_generate() and model.main_input_name == "input_ids"):
        inputs = example(model)
        if not segments:
            inputs.pop("token_type_ids", None)
        return [Graph("model", Forward(model), inputs, axes_of(model, inputs), limits_of(config))]
    if not config.is_encoder_decoder:
        return [decoder_graph(model)]
    if getattr(config, "decoding", "autoregressive") == "mask_predict":
        encoder, decoder = LengthEncoder(model), MaskDecoder(model)
    elif config.model_type == "tfm_rnn_seq2seq":
        encoder, decoder = RecurrentEncoder(model), RecurrentDecoder(model)
    else:
        encoder, decoder = Encoder(model), CrossDecoder(model)
    return encoder_decoder_graphs(model, encoder, decoder)


def decoder_graph(model: PreTrainedModel) -> Graph:
    """Return the graph of a decoder-only language model."""
    inputs = text(model.config, (CACHED,) * len(LENGTHS))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
    step = text(model.config, (NEW,) * len(LENGTHS))
    step["attention_mask"] = torch.cat([inputs["attention_mask"], step["attention_mask"]], dim=1)
    axes = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "total_length"}}
    past = emptied(cache, PAST)
    axes |= {name: {0: "batch", 2: "past_length"} for name in past}
    return Graph("model", Decoder(model), {**step, **past}, axes, limits_of(model.config))


@torch.no_grad()
def encoder_decoder_graphs(model: PreTrainedModel, encoder: nn.Module, decoder: nn.Module) -> list[Graph]:
    """Return the graphs of an encoder-decoder language model."""
    source, rows, limits = text(model.config, LENGTHS), len(LENGTHS), limits_of(model.config)
    ids = text(model.config, (NEW,) * rows)["input_ids"]
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "source_length"} for name in source}
    graph = Graph("encoder", encoder, source, axes, limits)
    encoded = encoder(**source)
    inputs = {"decoder_input_ids": ids, "attention_mask": source["attention_mask"]}
    target = {0: "batch", 1: "length"}
    axes = {"decoder_input_ids": target, "attention_mask": axes["attention_mask"]}
    if isinstance(decoder, RecurrentDecoder):
        inputs["decoder_input_ids"], axes["decoder_input_ids"] = ids[:, :1], {0: "batch"}
    if isinstance(decoder, MaskDecoder):
        inputs["decoder_attention_mask"], axes["decoder_attention_mask"] = torch.ones_like(ids), target
    for name, value in encoded.items():
        if name.startswith(MEMORY):
            inputs[name], axes[name] = value, {0: "batch", 2: "source_length"}
            if value.shape[2] == 1:  # without attention a recurrent decoder reads one state
                del axes[name][2]
        elif name.startswith(PRESENT):
            past = name.replace(PRESENT, PAST)
            inputs[past], axes[past] = value, {0: "batch"}
        elif name == "memory":
            inputs[name], axes[name] = value, {0: "batch", 1: "source_length"}
    if isinstance(decoder, CrossDecoder):
        memory = BaseModelOutput(last_hidden_state=encoded[f"{MEMORY}key_0"][:, 0])
        first = text(model.config, (CACHED,) * rows)["input_ids"]
        cache = EncoderDecoderCache(DynamicCache(), filled(DynamicCache(), encoded, MEMORY))
        cache.is_updated = dict.fromkeys(cache.is_updated, True)
        model(
            decoder_input_ids=first,
            attention_mask=source["attention_mask"],
            encoder_outputs=memory,
            **{CACHE_NAME: cache},
            use_cache=True,
        )
        for name, value in emptied(cache.self_attention_cache, PAST).items():
            inputs[name], axes[name] = value, {0: "batch", 2: "past_length"}
    return [graph, Graph("decoder", decoder, inputs, axes, limits)]


def text(config: Any, lengths: Sequence[int], seed: int = SEED, left: bool = False) -> dict[str, Tensor]:
    """Return random ``input_ids`` (B, T) and ``attention_mask`` of texts of given lengths, padded to the longest.

    Args:
        left: pad before the text.
    """
    pad = getattr(config, "pad_token_id", None)
    ids, mask = random_batch(tuple(lengths), config.vocab_size, pad or 0, torch.Generator().manual_seed(seed))
    found = {"input_ids": ids, "attention_mask": mask}
    return {name: value.flip(1) for name, value in found.items()} if left else found


def example(model: PreTrainedModel, lengths: Sequence[int] = LENGTHS, seed: int = SEED) -> dict[str, Tensor]:
    """Return random inputs of a forward pass with as many rows as ``lengths``, of these lengths for text."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values_videos":
        shape = (len(lengths), config.context_length, config.num_channels, *sides(config.image_size))
        return {"pixel_values_videos": torch.rand(shape, generator=generator)}
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        return fixed_images(config, len(lengths), seed)
    if model.main_input_name == "pixel_values":
        return fixed_photos(config, [(UNIT * length - 3, UNIT * (16 - length) - 1) for length in lengths], seed)
    inputs = text(config, lengths, seed)
    if getattr(config, "type_vocab_size", 0) > 1:
        shape = inputs["input_ids"].shape
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, shape, generator=generator)
    if "decoder_input_ids" in takes:
        target = text(config, lengths[::-1], seed + 1)
        inputs |= {f"decoder_{name}": value for name, value in target.items()}
    if type(model).__name__.endswith("MultipleChoice"):
        return {name: torch.stack([value, value.flip(0)], dim=1) for name, value in inputs.items()}
    return inputs


def axes_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, dict[int, str]]:
    """Return the axes of a forward pass that may vary: rows, lengths, and sides of images without a fixed size."""
    found = {}
    for name, value in inputs.items():
        axes = {0: "batch"}
        if model.main_input_name == "input_ids":
            axes[value.dim() - 1] = "target_length" if name.startswith("decoder_") else "length"
        elif name in ("pixel_values", "pixel_mask") and not hasattr(model.config, "image_size"):
            axes |= {value.dim() - 2: "height", value.dim() - 1: "width"}
        found[name] = axes
    return found


def limits_of(config: Any) -> dict[str, int]:
    """Return the most entries along each axis that a model of this configuration takes, where there is a limit."""
    most = getattr(config, "max_position_embeddings", None)
    if most is None or getattr(config, "position_embedding_type", "learned") != "learned":
        return {}
    if config.model_type == "tfm_long_range":
        most -= 1  # the class token
    return dict.fromkeys(("length", "source_length", "target_length", "total_length", "past_length"), most)
