"""Compression while training and of saved models: complete runs on small data, resuming, reports, refused options."""

import json
import re
import shutil

import pytest
import torch
from distill_text_recipes import NAMES, WIDE, command_line, run, save
from every_class import tiny
from recipe_helpers import ROOT, fresh_state, history, record
from transformers import AutoModelForSequenceClassification

from hf_tfm import TfmBertConfig, TfmBertForSequenceClassification, cli
from hf_tfm.compression.masks import Mask, Pruner
from hf_tfm.compression.structured import Blocks
from hf_tfm.options import parse_arguments
from hf_tfm.tasks.compression import compress
from hf_tfm.tasks.image_classification import ImageClassificationTask
from hf_tfm.tasks.text_classification import TextClassificationTask

HALF = "[{name: heads, ratio: 0.5}, {name: neurons, ratio: 0.5}]"
OPTIONS = {"calibration_samples": 16, "costs": "false", "batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def original(data, tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = TfmBertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **WIDE, **NAMES)
    return save(tmp_path_factory.mktemp("models") / "original", TfmBertForSequenceClassification(config), tokenizer)


def zeros(model) -> float:
    """Fraction of zeros in the linear layers of the blocks."""
    weights = [p for name, p in model.named_parameters() if ".layers." in name and name.endswith("proj.weight")]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_schedule_is_cubic():
    pruner = Pruner(tiny("bert"), "magnitude", 0.8, interval=2)
    pruner.schedule(10, 30)
    assert [pruner.sparsity_at(step) for step in (0, 10, 20, 30, 99)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])
    assert not pruner.may_select(30) and pruner.may_select(31)
    found = []
    for step in range(33):
        pruner.before_step(step)
        found.append(pruner.measured())
    assert found[11] == found[10] and found[20] == pytest.approx(0.7, abs=1e-3)
    assert found[-1] == pytest.approx(0.8, abs=1e-3)


def test_movement_trains_scores_by_the_gradient_of_the_mask():
    weight = torch.randn(3, 4, requires_grad=True)
    mask = Mask(weight, trained=True)
    mask.mask.copy_(torch.rand(3, 4) > 0.5)
    gradient = torch.randn(3, 4)
    mask(weight).backward(gradient)
    torch.testing.assert_close(weight.grad, gradient * mask.mask)
    torch.testing.assert_close(mask.scores.grad, gradient * weight)  # of masked weights, too


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [pytest.param("magnitude", marks=pytest.mark.slow), "movement"])
def test_pruned_run_resumes_exactly(pruning, data, original, tmp_path):
    options = {
        **OPTIONS,
        **{"model_name_or_path": original, "pruning": pruning, "sparsity": 0.6, "pruning_interval": 1},
        **{"max_steps": 8, "eval_steps": 2, "final_weights": "last", "ema_decay": 0.5, "pruning_end": 0.5},
    }
    assert run("compress_train", *command_line(data, tmp_path / "whole", **options)) == 0
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert zeros(whole) == pytest.approx(0.6, abs=1e-3)
    assert not any("scores" in name or "mask" in name for name in whole.state_dict())
    (done,) = record(tmp_path / "whole").compression["methods"]
    assert done["name"] == pruning and done["sparsity"] == pytest.approx(zeros(whole))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for path in (cut / "checkpoints").glob("*"):
        if path.name > "step-00000006":
            shutil.rmtree(path)
    assert run("compress_train", *command_line(data, cut, **options)) == 0
    again = AutoModelForSequenceClassification.from_pretrained(cut)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_best_weights_have_the_final_sparsity(data, original, tmp_path):
    options = {"model_name_or_path": original, "pruning": "magnitude", "sparsity": 0.5, "pruning_interval": 1}
    options |= {"max_steps": 6, "eval_steps": 1, "pruning_end": 0.5, **OPTIONS, "costs": "true"}
    assert run("compress_train", *command_line(data, tmp_path / "run", **options)) == 0
    found = record(tmp_path / "run")
    assert found.training["best"]["step"] > 3 and len(history(tmp_path / "run")) >= 6
    assert [cost["model"] for cost in found.costs] == ["original", "magnitude"]
    text = (tmp_path / "run" / "README.md").read_text()
    assert "## Compression" in text and "fraction of the original's score" in text


def test_pruned_student_learns_from_the_original(data, original, tmp_path):
    terms = "[{kind: soft_target}, {kind: hidden_state}]"
    options = {"model_name_or_path": original, "teacher": original, "terms": terms, **OPTIONS}
    methods = f"[{{name: layers, keep: [1]}}, {HALF[1:-1]}, {{name: low_rank, rank: 8}}]"
    argv = command_line(data, tmp_path / "run", method=methods, pruning="movement", sparsity=0.5, **options)
    assert run("compress_distill", *argv) == 0
    found = record(tmp_path / "run")
    names = [one["name"] for one in found.compression["methods"]]
    assert names == ["layers", "heads", "neurons", "low_rank", "movement"]
    assert found.distillation["teacher"] == "original"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert Blocks(model).counts("heads") == [1] and zeros(model) == pytest.approx(0.5, abs=1e-2)
    # Compressed and then distilled, in two commands.
    hf_tfm("compress", original, "--method", "{name: layers, keep: [0]}", "--output_dir", tmp_path / "half")
    student = {"model_name_or_path": tmp_path / "half", "teacher": original, "terms": terms}
    assert run("distill_task", *command_line(data, tmp_path / "student", **student, costs="false")) == 0
    with pytest.raises(ValueError, match="equal numbers of attention heads"):
        terms = "[{kind: attention_score}]"
        run("compress_distill", *command_line(data, tmp_path / "no", method=HALF, **{**options, "terms": terms}))


def test_image_classifiers_are_compressed_by_the_same_class():
    task_class = compress(ImageClassificationTask)
    assert task_class.__name__ == "ImageClassificationCompressionTask"
    assert {"method", "pruning", "image_size"} <= task_class.Arguments.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pruning": None}, "nothing to compress: give method or pruning"),
        ({"sparsity": 1.0}, "sparsity must be above 0 and below 1, got 1.0"),
        ({"pruning_begin": 0.8}, "pruning_begin must be at least 0 and below pruning_end.* got 0.8 and 0.7"),
        ({"final_weights": "average", "average_checkpoints": 2}, 'final_weights "average"'),
        ({"method": "[int8]"}, "method int8 cannot be trained"),
        ({"method": "[onnx]"}, 'method must be among .*, got "onnx"'),
        ({"model_name_or_path": None}, "model_name_or_path must name the model to compress"),
        ({"pruning": "movement", "learning_rate": 1e-6}, "scores_learning_rate must be at most 1000 times"),
    ],
)
def test_refused_options(changed, message, tmp_path, capsys):
    options = {"model_name_or_path": "model", "pruning": "magnitude", **changed}
    argv = command_line("data", tmp_path, **options)
    with pytest.raises(SystemExit):
        parse_arguments(compress(TextClassificationTask).Arguments, ROOT / "recipes" / "compress_train.py", argv)
    assert re.search(message, capsys.readouterr().err)


# --- hf-tfm compress -------------------------------------------------------------------------------------------------


def hf_tfm(*words) -> None:
    fresh_state()
    cli.main([str(word) for word in words])


def test_compress_report_and_refusals(data, original, tmp_path, capsys):
    where = ("--dataset_name", data, "--split", "validation", "--progress", "false")
    method = f"[{HALF[1:-1]}, int8]"
    hf_tfm("compress", original, "--method", method, "--output_dir", tmp_path / "small", *where)
    assert "quantized layers 16" in capsys.readouterr().out
    report = json.loads((tmp_path / "small" / "compression.json").read_text())
    first, second = report["rows"]
    assert second["megabytes"] < 0.5 * first["megabytes"] and second["gflops"] < first["gflops"]
    assert second["score"] == pytest.approx(second["kept"] * first["score"])
    assert (tmp_path / "small" / "pareto.png").is_file()
    assert "heads + neurons + int8" in (tmp_path / "small" / "README.md").read_text()
    hf_tfm("evaluate", tmp_path / "small", *where)
    assert f"{second['score']:.3f}" in capsys.readouterr().out
    hf_tfm("show", "compression", original, tmp_path / "small", "--output_dir", tmp_path / "report", *where)
    assert "kept, %" in capsys.readouterr().out and (tmp_path / "report" / "compression.md").is_file()
    training = command_line(data, tmp_path / "no", model_name_or_path=tmp_path / "small")
    with pytest.raises(ValueError, match="has int8 weights, which cannot be trained"):
        run("text_classification_train", *training)
    for words, message in {
        ("--method", "heads"): 'method "heads" is measured on data: give dataset_name',
        ("--method", "int9"): 'got "int9"; did you mean int8?',
    }.items():
        with pytest.raises(SystemExit):
            hf_tfm("compress", original, *words, "--output_dir", tmp_path / "x")
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit):
        hf_tfm("convert", tmp_path / "small", "--to", "bert", "--output_dir", tmp_path / "x")
    assert "bert cannot express layer_num_attention_heads=[1, 1]" in capsys.readouterr().err


def test_equally_many_neurons_are_exported_to_the_stock_class(data, original, tmp_path):
    method = "{name: neurons, ratio: 0.5, scope: layer}"
    hf_tfm("compress", original, "--method", method, "--output_dir", tmp_path / "half", "--dataset_name", data,
           "--split", "validation", "--progress", "false")  # fmt: skip
    hf_tfm("convert", tmp_path / "half", "--to", "bert", "--output_dir", tmp_path / "stock")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock").config.intermediate_size == 32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["onnx", "onnx_dynamic", "onnx_static"])
def test_onnx(method, data, original, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs pip install hf-tfm[onnx]")
    from hf_tfm.compression.onnx import OnnxModel

    where = ("--dataset_name", data, "--split", "validation", "--progress", "false")
    hf_tfm("compress", original, "--method", method, "--output_dir", tmp_path / "onnx", *where)
    first, second = json.loads((tmp_path / "onnx" / "compression.json").read_text())["rows"]
    assert second["gflops"] == first["gflops"] and second["parameters"] == first["parameters"]
    ids = torch.randint(5, 60, (3, 7))
    expected = TfmBertForSequenceClassification.from_pretrained(original).eval()(input_ids=ids).logits
    found = OnnxModel(tmp_path / "onnx")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if method == "onnx" else 0.05)
    hf_tfm("show", "compression", original, tmp_path / "onnx", "--output_dir", tmp_path / "report", *where)
