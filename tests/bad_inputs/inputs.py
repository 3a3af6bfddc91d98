"""Small data sets, models and files for the cases; each builder writes into the given folder."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 16


def png(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """A PNG of noise."""
    file = io.BytesIO()
    noise = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def texts(folder: Path, rows: int = 12, **changes: Any) -> None:
    """CSV files of texts and labels: train, validation and test.

    Args:
        changes: rows of a split, as lists of [text, label], or the bytes of its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "validation", "test")):
        path = folder / f"{split}.csv"
        given = changes.get(split, [[f"the text number {i + 100 * number} of two", i % 2] for i in range(rows)])
        if given is None:
            continue
        if isinstance(given, bytes):
            path.write_bytes(given)
            continue
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([changes.get("columns", ["text", "label"]), *given])


def images(folder: Path, classes: tuple[str, ...] = ("ant", "bee"), each: int = 6, **changes: bytes) -> None:
    """A folder of images: SPLIT/CLASS/NUMBER.png.

    Args:
        changes: file contents by "SPLIT_CLASS_NUMBER".
    """
    for split in ("train", "validation", "test"):
        for kind in classes:
            class_folder = folder / split / kind
            class_folder.mkdir(parents=True, exist_ok=True)
            for i in range(each):
                content = changes.get(f"{split}_{kind}_{i}", changes.get(split, png(i)))
                (class_folder / f"{i}.png").write_bytes(content)


def coco(folder: Path, change: Callable[[dict], Any] | None = None, raw: bytes | None = None) -> None:
    """A folder in COCO's layout: 4 training and 4 validation images, a box in each.

    Args:
        change: function that modifies the training file's content in place or returns a new one.
        raw: bytes of the training file instead.
    """
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).mkdir()
        for i in range(4):
            (folder / split / f"{i}.png").write_bytes(png(i, (64, 64)))
        content: Any = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(4)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [8, 8, 20, 20], "area": 400, "iscrowd": 0}
                for i in range(4)
            ],
        }
        if split == "train" and change is not None:
            content = change(content) or content
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_bytes(raw if raw is not None and split == "train" else json.dumps(content).encode())


MODELS = ("vit", "mae", "det", "txt", "bert", "gpt", "tr")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SENTENCES = [f"the text number {i} of two and more words" for i in range(300)]


def save_models(folder: Path) -> None:
    """A tiny random model of every family below a folder, each with its processor or tokenizer."""
    import torch

    import hf_tfm
    from hf_tfm.data.pixels import image_processor, scene_processor
    from hf_tfm.data.text import train_tokenizer
    from hf_tfm.data.vocabulary import train_bytes, train_wordpiece

    torch.manual_seed(0)
    names = {"id2label": {0: "ant", 1: "bee"}, "label2id": {"ant": 0, "bee": 1}}
    flat = {**SIZES, "num_hidden_layers": 1}
    pixels = {"image_size": SIDE, "patch_size": 8}
    decoder = {f"decoder_{name}": value for name, value in flat.items()}
    read = image_processor(SIDE, None, (0.5,) * 3, (0.5,) * 3)
    words = train_wordpiece(SENTENCES, 200)
    pieces, pairs = train_bytes(SENTENCES, 300), train_tokenizer(SENTENCES, 300)
    detr = {
        **{"backbone": "test_resnet", "backbone_norm": "batch", "num_queries": 5, "d_model": 16},
        **{"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    }
    sides = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    tokens = {name: getattr(pieces, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    found = {
        "vit": (hf_tfm.TfmViTForImageClassification, hf_tfm.TfmViTConfig(**flat, **pixels, **names), read),
        "mae": (hf_tfm.TfmMAEForPreTraining, hf_tfm.TfmMAEConfig(**flat, **pixels, **decoder), read),
        "det": (
            hf_tfm.TfmDetrForObjectDetection,
            hf_tfm.TfmDetrConfig(**detr, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}),
            scene_processor(64, 64, (0.5,) * 3, (0.5,) * 3),
        ),
        "txt": (
            hf_tfm.TfmBertForSequenceClassification,
            hf_tfm.TfmBertConfig(vocab_size=len(words), max_position_embeddings=64, **flat, **names),
            words,
        ),
        "bert": (
            hf_tfm.TfmBertForMaskedLM,
            hf_tfm.TfmBertConfig(vocab_size=len(words), max_position_embeddings=64, **flat),
            words,
        ),
        "gpt": (
            hf_tfm.TfmGPTForCausalLM,
            hf_tfm.TfmGPTConfig(
                vocab_size=len(pieces),
                max_position_embeddings=64,
                **{name: value for name, value in flat.items() if name in hf_tfm.TfmGPTConfig.__dataclass_fields__},
                **tokens,
            ),
            pieces,
        ),
        "tr": (
            hf_tfm.TfmTransformerForConditionalGeneration,
            hf_tfm.TfmTransformerConfig(
                vocab_size=len(pairs), **SIZES, **sides, **{name: getattr(pairs, name) for name in tokens}
            ),
            pairs,
        ),
    }
    for name in MODELS:
        kind, config, other = found[name]
        kind(config).save_pretrained(folder / name)
        other.save_pretrained(folder / name)
