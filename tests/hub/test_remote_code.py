"""Remote code of a model never runs without trust_remote_code, even if standard input would answer "yes"."""

import ast
import builtins
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_tfm import cli
from hf_tfm.conversion import convert

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for path in sorted([*(ROOT / "hf_tfm").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
    if path.parent.name != "models"
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_auto_classes_always_get_trust_remote_code(path):
    """Without the argument transformers asks on standard input."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("from_pretrained", "from_config"):
            continue
        owner = ast.unparse(node.func.value)
        names = [keyword.arg for keyword in node.keywords]
        if owner.startswith("Auto") and "trust_remote_code" not in names and None not in names:
            pytest.fail(f"{path}:{node.lineno}: {owner}.{node.func.attr} without trust_remote_code")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Native models whose config.json, tokenizer or image processor refers to code in the folder, and a photo."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))
    text = BertForSequenceClassification(BertConfig(**sizes, vocab_size=6, max_position_embeddings=8))
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two"])}
    for name in ("config", "processor", "plain"):
        vit.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / name)
    text.save_pretrained(folder / "tokenizer")
    BertTokenizer(words).save_pretrained(folder / "tokenizer")
    for name, file, change in (
        ("config", "config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}),
        ("processor", "preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.EvilProcessor"}}),
        ("tokenizer", "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}),
    ):
        path = folder / name / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        (path.parent / "evil.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\nraise ImportError('ran')\n")
    Image.new("RGB", (16, 16)).save(folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def confirm_every_prompt(monkeypatch):
    """Answer "y" to every prompt."""
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")


@pytest.mark.parametrize(
    ("command", "recommended"),
    [
        ("evaluate {0}/config --dataset_name digits", True),
        ("show positions {0}/config", True),
        ("show attention {0}/config {0}/photo.png", True),
        ("show attention {0}/tokenizer --text two --output_dir {1}/maps", None),
        ("evaluate {0}/tokenizer --dataset_name number-parity", None),
        ("convert {0}/config --to vit --output_dir {1}/out", False),
        ("convert {0}/tokenizer --to tfm --output_dir {1}/out", None),
        ("show attention {0}/processor {0}/photo.png --output_dir {1}/maps", None),
        ("convert {0}/processor --to tfm --output_dir {1}/out", None),
    ],
)
def test_commands_do_not_run_code(command, recommended, models, tmp_path, capsys):
    """``recommended``: whether the error names the option; None if the native class may be used instead."""
    try:
        cli.main(command.format(models, tmp_path).split())
    except SystemExit as ended:
        assert ended.code == 1
    assert not (models / "RAN").exists()
    printed = capsys.readouterr().err
    if recommended is not None:
        assert ("trust_remote_code" in printed.splitlines()[-1]) == recommended


def test_code_of_this_test_leaves_a_trace_when_it_runs(models):
    with pytest.raises(ImportError, match="ran"):
        AutoConfig.from_pretrained(models / "config", trust_remote_code=True)
    assert (models / "RAN").exists()
    (models / "RAN").unlink()


def test_converted_folder_refers_to_no_code(models, tmp_path):
    convert(models / "processor", "tfm", tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert "auto_map" not in saved
    assert saved["size"] == {"height": 16, "width": 16}
    assert not (tmp_path / "ours" / "evil.py").exists()
    convert(models / "plain", "tfm", tmp_path / "same")
    plain, same = ((f / "preprocessor_config.json").read_bytes() for f in (models / "plain", tmp_path / "same"))
    assert plain == same
