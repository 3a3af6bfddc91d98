"""A saved model includes its code: it loads without this package, and can be saved again."""

import json
from pathlib import Path

import torch
from processes import clean_environment, finish, start
from tiny_models import tiny_batch, tiny_model

from hf_tfm import TfmTransformerForConditionalGeneration, TfmTransformerModel, carry_code

# Runs in a separate process: load, compare with the saved outputs, save again.
LOADER = """
import sys
sys.modules["hf_tfm"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

source, target = sys.argv[1:]
try:
    import hf_tfm
except ImportError:
    pass
else:
    raise AssertionError("hf_tfm must not be importable here")
saved = torch.load(source + "/saved.pt", weights_only=True)
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
for auto in (AutoModelForSeq2SeqLM, AutoModel):
    model = auto.from_pretrained(source, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        hidden = model(**saved["batch"])
        if auto is AutoModel:
            assert torch.equal(hidden.last_hidden_state, saved["hidden"])
            continue
    assert torch.equal(hidden.logits, saved["logits"])
    inputs = {name: saved["batch"][name] for name in ("input_ids", "attention_mask")}
    for options, expected in saved["generated"]:
        assert torch.equal(model.generate(**inputs, **options), expected), options
    model.save_pretrained(target)
print("loaded", sorted(config.auto_map))
"""


def load_and_save(source: Path, target: Path, home: Path) -> str:
    """Run `LOADER` with an empty cache, so that no module of an earlier test is reused; returns its output."""
    # The same number of threads as here, because it affects the order of summation.
    threads = str(torch.get_num_threads())
    environment = clean_environment(HF_HOME=str(home / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS=threads)
    words = ("-c", LOADER, source, target)
    process = start(*words, environment=environment, cwd=home, server="torch", merge=False)
    finish(process)
    return process.stdout.read_text()


@torch.no_grad()
def save(folder: Path, options: list[dict], **fields) -> None:
    model, batch = tiny_model(tie_word_embeddings=False, **fields), tiny_batch()
    model.save_pretrained(folder)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    saved = {
        "batch": batch,
        "logits": model(**batch).logits,
        "hidden": model.model(**batch).last_hidden_state,
        "generated": [(arguments, model.generate(**inputs, **arguments)) for arguments in options],
    }
    torch.save(saved, folder / "saved.pt")


def test_save_load_and_save_again(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    save(first, [{"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 3}])
    family = ["AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"]
    assert load_and_save(first, second, tmp_path).strip() == f"loaded {family}"
    (first / "saved.pt").rename(second / "saved.pt")
    load_and_save(second, third, tmp_path)
    files = {path.name: path.read_bytes() for path in first.glob("*.py")}
    assert {"attention.py", "modeling_transformer.py", "configuration_transformer.py"} <= files.keys()
    assert {path.name: path.read_bytes() for path in third.glob("*.py")} == files, "the saved code is unchanged"
    assert json.loads((third / "config.json").read_text())["auto_map"].keys() == set(family)


def test_every_option_works_with_remote_code(tmp_path):
    fields = {"decoding": "mask_predict", "norm_first": True, "attention_score": "additive"}
    save(tmp_path / "first", [{"max_length": 9}], position_embedding_type="learned", **fields)
    load_and_save(tmp_path / "first", tmp_path / "second", tmp_path)


def test_base_model_is_saved_with_its_code(tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_transformer.TfmTransformerModel" and len(auto_map) == 3
    assert (tmp_path / "blocks.py").exists()


def test_saving_code_can_be_disabled(tmp_path):
    carry_code(False)
    try:
        tiny_model().save_pretrained(tmp_path)
    finally:
        carry_code(True)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert TfmTransformerForConditionalGeneration._auto_class == "AutoModelForSeq2SeqLM"
    assert TfmTransformerModel._auto_class == "AutoModel"
