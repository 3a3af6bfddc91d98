"""Self-attention maps of an encoder (BERT) or decoder (GPT) for a text, alone or next to those of another model.

    text -> tokens -> one forward pass with maps -> arrays -> PNG

Shapes: L layers; H heads; T tokens. Rows of a map are queries, columns keys; a row sums to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..hub.loading import check_vocabulary, load_config, load_model, load_tokenizer
from .attention import forming_maps, pick, stack
from .grid import Grid, check_tokens
from .tokens import token_labels

SIDES = ("left", "right")


@dataclass(frozen=True)
class TextAttentionMaps:
    """Attention maps of a text.

    Args:
        model: name of the model.
        text: input text, or both texts of a pair.
        tokens: T tokens in readable form (see `token_labels`).
        maps: (L, H, T, T) float32.
    """

    model: str
    text: str
    tokens: list[str]
    maps: np.ndarray


def reads_pairs(model: str, trust_remote_code: bool = False) -> bool:
    """Return True if the model of a folder or Hub id is an encoder-decoder.

    Raises:
        ValueError: it is not a text model.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    if not getattr(config, "vocab_size", None):
        raise ValueError(f'"{model}" is a {config.model_type} model, but a text needs a text model')
    return bool(config.is_encoder_decoder)


def load_text_model(
    model: str, trust_remote_code: bool = False, argument: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the encoder or decoder of a folder or Hub id, without a head, and its tokenizer.

    Args:
        trust_remote_code: run the model's own code.
        argument: name of the caller's argument, for errors.

    Raises:
        LoadingError: weights are missing, or files cannot be read.
    """
    options = {"argument": argument, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model, **options)
    # A missing pooler, which pretraining omits, is harmless because its output is not used.
    loaded = load_model(AutoModel, model, may_lack=lambda name: "pooler." in name, **options)
    check_vocabulary(model, loaded.config, tokenizer, argument)
    return loaded, tokenizer


@torch.no_grad()
def text_attention_maps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None = None
) -> TextAttentionMaps:
    """Run a model on a text and return its attention maps.

    Args:
        model: an encoder or a decoder, of this package or of transformers. It runs without dropout, and its state is
            restored.
        tokenizer: tokenizer of the model.
        text: input text.
        pair: second text, for a tokenizer that encodes pairs.

    Raises:
        ValueError: a text is empty or too long, or the model is an encoder-decoder.
    """
    for name, value in (("text", text), ("pair", pair)):
        if value is not None and not value.strip():
            raise ValueError(f"{name} must hold at least one word, got {value!r}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model must be an encoder or a decoder alone, got {type(model).__name__}")
    encoded = tokenizer(text, pair, return_tensors="pt").to(model.device)
    check_tokens("text", encoded["input_ids"].shape[1], model.config.max_position_embeddings)
    with forming_maps(model):
        outputs = model(**encoded, output_attentions=True)
    name = str(model.config._name_or_path or type(model).__name__)
    return TextAttentionMaps(
        model=Path(name).resolve().name if Path(name).exists() else name,
        text=text if pair is None else f"{text} | {pair}",
        tokens=token_labels(tokenizer, encoded["input_ids"][0].tolist()),
        maps=stack(outputs.attentions),
    )


def plot_text_attention(
    found: TextAttentionMaps,
    output: str | Path,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Path:
    """Plot all maps, with a row per layer and a column per head.

    Args:
        output: a ".png" file.
        layers, heads: those to plot, counted from 0; by default all.

    Raises:
        ValueError: a layer or head does not exist, or the image would be too large.
    """
    rows, columns = pick(layers, len(found.maps), "layers"), pick(heads, found.maps.shape[1], "heads")
    panels = found.maps[np.ix_(rows, columns)]
    titles = [f"layer {row}" for row in rows], [f"head {column}" for column in columns]
    return grid(panels, found, *titles, [f"{found.model}: self-attention", found.text]).save(output)


def plot_beside(
    teacher: TextAttentionMaps,
    student: TextAttentionMaps,
    output: str | Path,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Path:
    """Plot two models' maps side by side: one row per layer of the student, next to the teacher layer that it maps to
    (m of M to m N / M of N, as in TinyBERT, Jiao et al. 2020, section 3.1).

    Args:
        output: a ".png" file.
        layers: student layers, counted from 0; by default all.
        heads: heads of both models, counted from 0; by default the mean over all.

    Raises:
        ValueError: the texts' tokens differ, a layer or head does not exist, or the image would be too large.
    """
    if teacher.tokens != student.tokens:
        raise ValueError(f"{teacher.model} and {student.model} must read the same tokens: their tokenizers differ")
    N, M = len(teacher.maps), len(student.maps)
    rows = pick(layers, M, "layers")
    above = [max(0, -(-(row + 1) * N // M) - 1) for row in rows]  # rounded up if N is not a multiple of M
    pairs = (teacher, above), (student, rows)
    if heads is None:
        panels = np.stack([found.maps[numbers].mean(axis=1) for found, numbers in pairs], axis=1)
        columns = [f"{side}, mean" for side in SIDES]
    else:
        chosen = [pick(heads, found.maps.shape[1], f"heads of {found.model}") for found, _ in pairs]
        parts = [found.maps[np.ix_(numbers, own)] for (found, numbers), own in zip(pairs, chosen, strict=True)]
        panels = np.concatenate(parts, axis=1)
        columns = [f"{side}, {head}" for side, own in zip(SIDES, chosen, strict=True) for head in own]
    titles = [f"layers {high}, {low}" for high, low in zip(above, rows, strict=True)]
    heading = f"self-attention of {teacher.model}, left, and {student.model}, right"
    return grid(panels, student, titles, columns, [heading, student.text]).save(output)


def grid(panels: np.ndarray, found: TextAttentionMaps, rows: list[str], columns: list[str], title: list[str]) -> Grid:
    """Create the grid for maps (R, C, T, T)."""
    names = {"query_name": "token", "key_name": "token looked at"}
    return Grid(panels, queries=found.tokens, keys=found.tokens, rows=rows, columns=columns, **names, title=title)
