"""Runs of an earlier version, with option names that have changed since, are resumed and give the same result.

`tests/fixtures/earlier_runs` explains how they were made.
"""

import json
import shutil

import pytest
import torch
from recipe_helpers import ROOT, fresh_state
from safetensors.torch import load_file
from transformers import AutoModel

from hf_tfm.recipe_files import run
from hf_tfm.tasks.evaluation import evaluate

RUNS = ROOT / "tests" / "fixtures" / "earlier_runs"
STEPS = [
    *("--max_steps", "4", "--num_train_epochs", "null", "--save_steps", "2", "--eval_steps", "2"),
    *("--save_total_limit", "9", "--warmup_steps", "1", "--lr_scheduler_type", "constant"),
    *("--progress", "false", "--logging_steps", "1", "--mixed_precision", "no"),
]
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
ENCODER = {**SMALL, "num_hidden_layers": 1}
LANGUAGE = {**ENCODER, "max_position_embeddings": 32}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "decoder_num_hidden_layers": 1,
}
CASES = {
    "translation": (
        "translation_train",
        {**SMALL, "num_encoder_layers": 1, "num_decoder_layers": 1},
        "--vocab_size 270 --metric_for_best_model loss --batch_tokens 256 --test_splits []",
    ),
    "vit": ("image_classification_train", ENCODER, "--warmup_epochs null --batch_size 16 --test_splits []"),
    "mae": ("mae_pretrain", {**ENCODER, **DECODER}, "--warmup_epochs null --batch_size 16"),
    "bert": ("language_pretrain", LANGUAGE, "--vocab_size 60 --batch_tokens 256"),
    "gpt": ("language_pretrain", LANGUAGE, "--objective causal --vocab_size 300 --batch_tokens 256"),
    "text": (
        "text_classification_train",
        LANGUAGE,
        "--warmup_ratio null --vocab_size 60 --batch_size 8 --test_splits []",
    ),
}


# A text, a classification and an image; the models of all are scored below.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("bert", "gpt", "mae") else ()) for name in CASES]
)
def test_run_of_an_earlier_version_resumes(name, tmp_path, capsys):
    fresh_state()
    recipe, model, options = CASES[name]
    folder = tmp_path / "run"
    shutil.copytree(RUNS / name, folder, ignore=shutil.ignore_patterns("expected*"))
    words = ["--config", "quickstart", *STEPS, "--model", json.dumps(model), *options.split()]
    with pytest.raises(SystemExit) as end:
        run(recipe, [*words, "--output_dir", str(folder)])
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    assert "resuming from" in printed.out
    expected, found = (
        load_file(file) for file in (RUNS / name / "expected.safetensors", folder / "model.safetensors")
    )
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.endswith("k_proj.bias"):  # softmax ignores it: its gradient is rounding noise, which Adam amplifies
            continue
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    scores, earlier = (
        {(row["split"], row["name"]): row["value"] for row in json.loads(file.read_text())["metrics"]}
        for file in (folder / "results.json", RUNS / name / "expected.json")
    )
    assert scores == pytest.approx(earlier, rel=1e-3)


@pytest.mark.parametrize("name", list(CASES))
def test_model_of_an_earlier_version_loads_and_is_scored(name, tmp_path):
    shutil.copy(RUNS / name / "expected.safetensors", tmp_path / "model.safetensors")
    shutil.copy(RUNS / name / "config.json", tmp_path / "config.json")
    for folder in ("tokenizer", "processor"):
        if (RUNS / name / folder).is_dir():
            shutil.copytree(RUNS / name / folder, tmp_path, dirs_exist_ok=True)
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] or all("pooler" in key for key in report["missing_keys"])
    earlier = json.loads((RUNS / name / "expected.json").read_text())
    options = {"dataset_name": earlier["data"]["path"], "split": "validation", "progress": False}
    if name == "translation":
        options |= {"metrics": ["exact_match"], "max_samples": 4}
    if name in ("bert", "gpt"):
        options |= {"text_column": "translation.en", "sequences": "rows", "max_length": 32}
    if name == "text":
        options["split"] = earlier["metrics"][0]["split"]
    found = {row["name"]: row["value"] for row in evaluate(str(tmp_path), **options)["metrics"]}
    for row in earlier["metrics"]:
        if row["name"] in found and row["split"] == options["split"]:
            assert found[row["name"]] == pytest.approx(row["value"], rel=1e-3), row["name"]
