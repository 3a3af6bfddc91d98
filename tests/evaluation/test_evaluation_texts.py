"""hf-tfm evaluate on text classifiers, ours and transformers': expected scores, labels, and GLUE tasks."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from hf_tfm import TfmBertConfig, TfmBertForSequenceClassification, cli
from hf_tfm.data.glue import TASKS
from hf_tfm.data.text import train_tokenizer
from hf_tfm.data.vocabulary import train_wordpiece
from hf_tfm.metrics import Glue
from hf_tfm.tasks.evaluation import evaluate

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
COUNT = 21
CHOOSE = np.random.RandomState(0)
TEXTS = ["".join(CHOOSE.choice(list("abcde "), CHOOSE.randint(4, 30))) for _ in range(2 * COUNT)]
LABELS = CHOOSE.randint(0, 2, COUNT).tolist()
NAMES = ["negative", "positive"]
QUIET = {"progress": False, "batch_size": 4}


def save_rows(folder, labels=LABELS, kind=None, columns=("sentence",), split="validation") -> str:
    """Write a data set with one split."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {name: TEXTS[i * COUNT : (i + 1) * COUNT] for i, name in enumerate(columns)} | {"label": labels}
    features = Features({**{name: Value("string") for name in columns}, "label": kind or ClassLabel(names=NAMES)})
    Dataset.from_dict(table, features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def save_model(folder, kind="tfm_bert", **fields) -> str:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    fields = {**SMALL, **labels, **fields}
    tokenizer = train_tokenizer(TEXTS, 270) if kind == "gpt2" else train_wordpiece(TEXTS, 60)
    if kind == "gpt2":
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer._special_tokens_map["pad_token"] = None  # as in GPT-2
        ends = {"bos_token_id": 2, "eos_token_id": 2}
        model = GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), **ends, **fields))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **fields))
    else:
        config = TfmBertConfig(vocab_size=len(tokenizer), intermediate_size=16, **fields)
        model = TfmBertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def logits(model: str, pairs: bool = False) -> np.ndarray:
    """Logits (N, C), computed one text at a time."""
    loaded, tokenizer = AutoModelForSequenceClassification.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    rows = []
    for i in range(COUNT):
        inputs = tokenizer(*([TEXTS[i], TEXTS[COUNT + i]] if pairs else [TEXTS[i]]), return_tensors="pt")
        rows.append(loaded.eval()(**inputs).logits[0].detach())
    return torch.stack(rows).numpy()


def values(result) -> dict[str, float]:
    return {row["name"]: row["value"] for row in result["metrics"]}


@pytest.mark.parametrize("kind", ["tfm_bert", "bert", "gpt2"])
@pytest.mark.parametrize("pairs", [False, True])
def test_scores_equal_the_model_called_directly(kind, pairs, tmp_path):
    columns = ("premise", "hypothesis") if pairs else ("sentence",)
    where = save_rows(tmp_path / "data", columns=columns)
    folder = save_model(tmp_path / "model", kind)
    result = evaluate(folder, dataset_name=where, split="validation", text_columns=list(columns), **QUIET)
    predicted = logits(folder, pairs).argmax(axis=1)
    assert values(result) == Glue(metrics=["accuracy", "f1"]).compute(predictions=predicted, references=LABELS)
    assert (result["texts"], result["unlabelled"], result["match_labels"]) == (COUNT, 0, "name")
    assert set(result["throughput"]) == {"model", "whole"} and min(result["throughput"].values()) > 0


def test_command_line_and_predictions(model, data, tmp_path, capsys):
    file, plot = tmp_path / "out.json", tmp_path / "confusion.png"
    more = ["--progress", "false", "--output", str(file), "--confusion", str(plot)]
    cli.main(["evaluate", model, "--dataset_name", data, "--task", "sst2", "--split", "validation", *more])
    printed = capsys.readouterr().out
    scores = logits(model)
    accuracy = np.mean(scores.argmax(axis=1) == LABELS)
    assert f"validation  accuracy        {accuracy:8.3f}" in printed and "f1" not in printed  # SST-2's metric
    assert f"{COUNT} texts, 0 of them without a label" in printed
    rows = json.loads(file.read_text())["predictions"]
    assert [row["predicted"] for row in rows] == [NAMES[i] for i in scores.argmax(axis=1)]
    assert [row["label"] for row in rows] == [NAMES[i] for i in LABELS]
    likelihood = torch.from_numpy(scores).softmax(dim=1).amax(dim=1).numpy()
    assert np.allclose([row["probability"] for row in rows], likelihood, atol=1e-5)
    assert plot.is_file()


def test_labels_by_name_and_number(model, data, tmp_path):
    """The same labels in another order, as text, or as class numbers of the task."""
    expected = evaluate(model, dataset_name=data, split="validation", **QUIET)["metrics"]
    turned = save_rows(tmp_path / "a", [1 - label for label in LABELS], ClassLabel(names=NAMES[::-1]))
    text = save_rows(tmp_path / "b", [NAMES[label] for label in LABELS], Value("string"))
    for where in (turned, text):
        columns = {"text_columns": ["sentence"], "label_column": "label"}
        assert evaluate(model, dataset_name=where, split="validation", **columns, **QUIET)["metrics"] == expected
    plain = save_rows(tmp_path / "c", kind=Value("int64"))
    options = {"metrics": ["accuracy", "f1"], "split": "validation", **QUIET}
    assert evaluate(model, dataset_name=plain, task="sst2", **options)["metrics"] == expected
    with pytest.raises(ValueError, match="only the data set has 0, 1; only the model has negative, positive"):
        evaluate(model, dataset_name=plain, **options)
    assert evaluate(model, dataset_name=plain, match_labels="number", **options)["metrics"] == expected


def test_hidden_labels_allow_predictions_only(model, tmp_path):
    hidden = save_rows(tmp_path / "a", [-1] * COUNT, split="test")
    with pytest.raises(ValueError, match='split "test" has no labels, so it cannot be scored; output writes its'):
        evaluate(model, dataset_name=hidden, **QUIET)
    result = evaluate(model, dataset_name=hidden, output=str(tmp_path / "out.json"), **QUIET)
    assert result["metrics"] == [] and result["unlabelled"] == COUNT and "predictions" not in result
    rows = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [row["label"] for row in rows] == [None] * COUNT and rows[0]["predicted"] in NAMES


def test_numbers(tmp_path):
    folder = save_model(tmp_path / "model", id2label={0: "score"}, label2id={"score": 0}, problem_type="regression")
    labels = [0.25 * i if i % 4 else -1.0 for i in range(COUNT)]  # STS-B marks hidden labels by -1
    where = save_rows(tmp_path / "data", labels, Value("float32"), ("sentence1", "sentence2"))
    result = evaluate(folder, dataset_name=where, split="validation", task="stsb", **QUIET)
    known = [i for i in range(COUNT) if i % 4]
    pair = logits(folder, pairs=True)[known, 0], np.array(labels)[known]
    assert values(result)["pearson"] == pytest.approx(np.corrcoef(*pair)[0, 1], abs=1e-5)
    assert result["unlabelled"] == COUNT - len(known)
    with pytest.raises(ValueError, match="confusion is for classes, but the model predicts a number"):
        evaluate(
            folder, dataset_name=where, split="validation", task="stsb", confusion=str(tmp_path / "c.png"), **QUIET
        )
    with pytest.raises(ValueError, match="predicts a number, and the labels of the data set are ClassLabel"):
        evaluate(folder, dataset_name=save_rows(tmp_path / "classes"), split="validation", **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, 'split "tset" is not a split of the data set; it has validation'),
        ({"task": "sst3"}, 'task must be one of cola, .*, got "sst3"'),
        ({"text_columns": ["fr"]}, 'text_columns "fr" is not a column of the data set; it has sentence, label'),
        ({"metrics": ["bleu"]}, 'metrics of classes must be among accuracy, .*, got "bleu"'),
        ({"match_labels": "order"}, 'match_labels must be one of name, number, got "order"'),
        ({"confusion": "c.pdf"}, 'confusion must be a ".png" file, got "c.pdf"'),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"num_beams": 3}, "num_beams is for translation models"),
        ({"output": "/nowhere/x.json"}, "there is no folder /nowhere"),
    ],
)
def test_invalid_options_are_refused(model, data, options, message):
    with pytest.raises(ValueError if "output" not in options else FileNotFoundError, match=message):
        evaluate(model, dataset_name=data, **{"split": "validation", **QUIET, **options})


def test_model_without_classifier_weights_is_refused(data, tmp_path):
    from hf_tfm import TfmBertModel

    tokenizer = train_wordpiece(TEXTS, 60)
    TfmBertModel(TfmBertConfig(vocab_size=len(tokenizer), intermediate_size=16, **SMALL)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for classifier\.bias, classifier\.weight"):
        evaluate(str(tmp_path), dataset_name=data, split="validation", **QUIET)


# --- several tasks


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Two tasks with data; models of one of them and of a third task."""
    folder = tmp_path_factory.mktemp("glue")
    save_rows(folder / "glue-sst2")
    save_rows(
        folder / "glue-rte", kind=ClassLabel(names=list(TASKS["rte"].labels)), columns=("sentence1", "sentence2")
    )
    models = folder / "models"
    save_model(models / "sst2")
    save_model(models / "cola", id2label=dict(enumerate(TASKS["cola"].labels)), label2id={})
    return models, f"{folder}/glue-{{task}}"


def test_tasks_and_macro_average(glue, tmp_path, capsys):
    models, data = glue
    alone = evaluate(str(models / "sst2"), dataset_name=data, task="sst2", split="validation", **QUIET)["metrics"]
    for name in (str(models), str(models / "{task}")):
        result = evaluate(name, dataset_name=data, tasks="glue", output=str(tmp_path / "out.json"), **QUIET)
        assert [{k: v for k, v in row.items() if k != "task"} for row in result["metrics"]] == alone
        assert result["scores"] == {"sst2": alone[0]["value"]} and result["macro_average"] == alone[0]["value"]
        assert set(result["missing"]) == set(TASKS) - {"sst2"}
        assert "there is no model" in result["missing"]["rte"] and "cannot be loaded" in result["missing"]["cola"]
        written = json.loads((tmp_path / "out.json").read_text())
        assert len(written["details"][0]["predictions"]) == COUNT and "predictions" not in result["details"][0]
    cli.main(["evaluate", str(models), "--dataset_name", data, "--tasks", "sst2,rte", "--progress", "false"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("macro average of 1 of GLUE's 9 tasks: 0.")
    assert printed[-1].startswith("rte: not scored, there is no model ")


def test_single_model_for_one_task(glue):
    models, data = glue
    result = evaluate(str(models / "sst2"), dataset_name=data, tasks="sst2", **QUIET)
    assert list(result["scores"]) == ["sst2"]
    with pytest.raises(ValueError, match="is a single classifier, but each task has its own: give a folder of them"):
        evaluate(str(models / "sst2"), dataset_name=data, tasks="sst2,rte", **QUIET)
    with pytest.raises(ValueError, match=r"no task can be scored\. wnli: there is no model"):
        evaluate(str(models), dataset_name=data, tasks="wnli", **QUIET)
