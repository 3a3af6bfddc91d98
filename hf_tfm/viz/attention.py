"""Attention maps of an encoder-decoder model for one sentence, and plots of them.

    text -> tokens -> translation, if none is given -> one forward pass with maps -> arrays -> PNG

Shapes: L layers; H heads; S source tokens; T target tokens. Rows of a map are queries, columns keys; a row sums to 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.text import EXTRA_LENGTH
from .grid import Grid, check_tokens
from .tokens import token_labels

KINDS = {
    "encoder": ("encoder self-attention", "source token", "source token looked at"),
    "decoder": ("decoder self-attention", "token read", "token looked at"),
    "cross": ("cross-attention", "token predicted", "source token looked at"),
}


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps of a sentence and its translation.

    Args:
        model: name of the model.
        text: source sentence.
        translation: target sentence, given or generated.
        source: S source tokens in readable form (see `token_labels`).
        read: T input tokens of the decoder; for an autoregressive model the first is the start token.
        predicted: T tokens predicted at these positions: for an autoregressive model, the next ones.
        encoder: (L, H, S, S) float32; L is 0 for a recurrent model.
        decoder: (L, H, T, T) float32; L is 0 for a recurrent model.
        cross: (L, H, T, S) float32.
    """

    model: str
    text: str
    translation: str
    source: list[str]
    read: list[str]
    predicted: list[str]
    encoder: np.ndarray
    decoder: np.ndarray
    cross: np.ndarray


@contextmanager
def forming_maps(model: PreTrainedModel) -> Iterator[None]:
    """Use evaluation mode and eager attention, the only backend in which transformers' own models return maps."""
    backend, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(backend)
        model.train(training)


def translate(model: PreTrainedModel, source: dict[str, Tensor]) -> list[int]:
    """Translate one sentence; return ids without the start token, up to and including the end token."""
    limits = {}
    if model.generation_config.max_length is None and model.generation_config.max_new_tokens is None:
        # Vaswani et al. 2017, section 6.1, instead of transformers' default of 20 tokens.
        longest = source["input_ids"].shape[1] + EXTRA_LENGTH
        limits["max_length"] = min(longest, getattr(model.config, "max_position_embeddings", longest))
    ids = model.generate(**source, **limits)[0, 1:].tolist()
    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


@torch.no_grad()
def attention_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    target: str | None = None,
    device: str | torch.device | None = None,
) -> AttentionMaps:
    """Run a model on one sentence and return its attention maps.

    Args:
        model: an encoder-decoder model, such as `TfmTransformerForConditionalGeneration` or `MarianMTModel`, with any
            attention backend. It runs without dropout, and its state is restored.
        tokenizer: tokenizer of the model; appends the end token.
        text: source sentence.
        target: translation; by default the model generates one.
        device: device to move the model to; by default it is not moved.

    Raises:
        ValueError: ``text`` or ``target`` is empty or too long, or the model is not an encoder-decoder or has no
            attention.
    """
    for name, value in (("text", text), ("target", target)):
        if value is not None and not value.strip():
            raise ValueError(f"{name} must hold at least one word, got {value!r}")
    if not model.config.is_encoder_decoder:
        raise ValueError(f"model must be an encoder-decoder, got {type(model).__name__}")
    if device is not None:
        model.to(device)
    fixed = getattr(model.config, "position_embedding_type", "learned") == "learned"
    longest = getattr(model.config, "max_position_embeddings", None) if fixed else None
    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    check_tokens("text", encoded["input_ids"].shape[1], longest)
    if target is not None:
        check_tokens("target", len(tokenizer(text_target=target)["input_ids"]), longest)
    source = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
    with forming_maps(model):
        predicted = translate(model, source) if target is None else tokenizer(text_target=target)["input_ids"]
        read = predicted
        if getattr(model.config, "decoding", "autoregressive") == "autoregressive":
            read = [model.config.decoder_start_token_id, *predicted[:-1]]
        decoder_input_ids = torch.tensor([read], device=model.device)
        outputs = model(**source, decoder_input_ids=decoder_input_ids, output_attentions=True, use_cache=False)
    if not outputs.cross_attentions:
        raise ValueError(f"model must have attention over the source, got a {type(model).__name__} without")
    name = str(model.config._name_or_path or type(model).__name__)
    return AttentionMaps(
        model=Path(name).name if Path(name).exists() else name,
        text=text,
        translation=tokenizer.decode(predicted, skip_special_tokens=True).strip() if target is None else target,
        source=token_labels(tokenizer, source["input_ids"][0].tolist()),
        read=token_labels(tokenizer, read),
        predicted=token_labels(tokenizer, predicted),
        encoder=stack(outputs.encoder_attentions),
        decoder=stack(outputs.decoder_attentions),
        cross=stack(outputs.cross_attentions),
    )


def stack(layers: Sequence[Tensor] | None) -> np.ndarray:
    """Concatenate L maps of one sentence, (1, H, Q, K) each -> (L, H, Q, K) float32; L is 0 without attention."""
    return torch.cat(list(layers)).float().cpu().numpy() if layers else np.zeros((0, 0, 0, 0), np.float32)


def pick(numbers: Sequence[int] | None, count: int, argument: str) -> list[int]:
    """Return the chosen layers or heads, by default all; negative numbers count from the end."""
    if numbers is None:
        return list(range(count))
    bad = [number for number in numbers if not -count <= number < count]
    if bad or not numbers:
        raise ValueError(f"{argument} must be one or more of 0 to {count - 1}, got {list(numbers)}")
    return [number % count for number in numbers]


def plot_attention(
    maps: AttentionMaps,
    output: str | Path,
    which: Sequence[str] = ("encoder", "decoder", "cross"),
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> list[Path]:
    """Plot all maps: one image per kind that the model has, with a row per layer and a column per head.

    All panels share one colour scale from 0 to 1. The image grows with the sentence to keep tokens legible, up to 80
    million pixels: 60 tokens per side with 6 layers of 16 heads.

    Args:
        maps: result of `attention_maps`.
        output: a folder for ``encoder.png``, ``decoder.png`` and ``cross.png``; or a ".png" file for one kind.
        which: kinds to plot.
        layers: layers to plot, counted from 0; by default all.
        heads: heads to plot, counted from 0; by default all.

    Returns:
        The files, in the order of ``which``.

    Raises:
        ValueError: a kind, layer or head does not exist, or an image would be too large.
    """
    output = Path(output)
    unknown = [kind for kind in which if kind not in KINDS]
    if unknown or not which:
        raise ValueError(f"which must be one or more of {', '.join(KINDS)}, got {list(which)}")
    is_file = output.suffix == ".png"
    if is_file and len(which) > 1:
        raise ValueError(f'output must be a folder for {len(which)} kinds of maps, got the file "{output}"')
    files = []
    for kind in which:
        panels = getattr(maps, kind)
        if not len(panels) and len(which) > 1:
            continue
        chosen_layers = pick(layers, panels.shape[0], "layers")
        chosen_heads = pick(heads, panels.shape[1], "heads")
        grid = Grid(
            panels[np.ix_(chosen_layers, chosen_heads)],
            rows=[f"layer {layer}" for layer in chosen_layers],
            columns=[f"head {head}" for head in chosen_heads],
            **lettering(maps, kind),
        )
        files.append(grid.save(output if is_file else output / f"{kind}.png"))
    return files


def plot_alignment(maps: AttentionMaps, output: str | Path, layer: int = -1) -> Path:
    """Plot which source tokens each predicted token attends to: cross-attention of one layer, averaged over heads.

    Args:
        maps: result of `attention_maps`.
        output: a ".png" file.
        layer: counted from 0, or from the end if negative; by default the last.

    Raises:
        ValueError: the layer does not exist, or the image would be too large.
    """
    (layer,) = pick([layer], len(maps.cross), "layer")
    mean = maps.cross[layer].mean(axis=0)[None, None]  # (1, 1, T, S)
    letters = lettering(maps, "cross")
    return Grid(mean, rows=[f"layer {layer}"], columns=["mean over heads"], cell=0.28, font=10, **letters).save(output)


def lettering(maps: AttentionMaps, kind: str) -> dict:
    """Return the labels and titles of a plot, as fields of `Grid`."""
    what, query_name, key_name = KINDS[kind]
    queries = {"encoder": maps.source, "decoder": maps.read, "cross": maps.predicted}[kind]
    sentence = maps.text if kind == "encoder" else f"{maps.text} \N{RIGHTWARDS ARROW} {maps.translation}"
    return {
        "queries": queries,
        "keys": maps.read if kind == "decoder" else maps.source,
        "query_name": query_name,
        "key_name": key_name,
        "title": [f"{maps.model}: {what}", sentence],
    }
