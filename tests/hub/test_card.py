"""Model card, results file and training curve of a run; the card's full text is compared with card.golden.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from matplotlib.image import imread

from hf_tfm import TfmTransformerConfig, cli
from hf_tfm.hub.card import write_card
from hf_tfm.hub.curve import plot_history, plot_scores
from hf_tfm.hub.results import RunRecord, collect_versions, describe_hardware, read_evaluations, read_history

GOLDEN = Path(__file__).with_name("card.golden.md")
CARDS = Path(__file__).parents[2] / "model_cards"
BLEU = "nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0"

RECORD = {
    "task": "translation",
    "model_type": "tfm_transformer",
    "parameters": 3_456_789,
    "base_model": None,
    "data": {
        "path": "user/sentences",
        "name": "short",
        "revision": "5503434ddd753f426f4b38109466949a1217c2bb",
        "fingerprint": {"train": "0a1b2c", "test": "3d4e5f"},
        "license": "cc-by-4.0",
        "source_column": "translation.en",
        "target_column": "translation.de",
        "rows": {"train": 29000, "validation": None, "test": 1000},
    },
    "arguments": {
        "output_dir": "runs/tiny",
        "learning_rate": 0.005,
        "adam_betas": [0.9, 0.98],
        "model": {"dropout": 0.3},
        "model_name_or_path": None,
        "license": "apache-2.0",
    },
    "command": "hf-tfm run translation_train --config tiny",
    "metrics": [
        {"name": "bleu_lowercase", "value": 41.0249, "split": "test", "signature": BLEU},
        {"name": "exact_match", "value": 0.25, "split": "test", "signature": None},
    ],
    "training": {
        "steps": 12000,
        "epochs": 30,
        "seconds": 7384.2,
        "items_per_second": 6543.21,
        "item": "target tokens",
        "skipped_steps": 2,
        "best": {"metric": "loss", "value": 2.34567, "step": 11000},
        "weights": "average",
    },
    "versions": {"python": "3.11.7", "hf-tfm": "0.1.0", "torch": "2.15.0"},
    "hardware": {"device": "cpu", "count": 1, "cpu": "A processor", "cpu_cores": 2, "threads": 2, "memory_gb": None},
    "started": "2026-11-21T10:00:00+00:00",
    "finished": "2026-11-21T12:10:00+00:00",
}


def with_changes(**changes) -> dict:
    """A copy of the record; "data__path" changes record["data"]["path"]."""
    record = json.loads(json.dumps(RECORD))
    for name, value in changes.items():
        *parents, last = name.split("__")
        part = record
        for parent in parents:
            part = part[parent]
        part[last] = value
    return record


def write_history(folder: Path) -> None:
    rows = []
    for step in range(50, 1001, 50):
        rate = 5e-3 * min(step / 200, (200 / step) ** 0.5)
        loss = 2.0 + 6.0 * 0.995**step
        rows.append({"step": step, "epoch": step // 250, "loss": loss, "learning_rate": rate, "items_per_second": 1e3})
        if step % 250 == 0:
            rows.append(
                {
                    "step": step,
                    "epoch": step // 250,
                    "seconds": step / 2,
                    "evaluation": {"loss": loss + 0.3, "bleu": step / 25},
                }
            )
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A run's folder: config.json with an auto_map, and a history."""
    folder = tmp_path / "tiny"
    config = TfmTransformerConfig(architectures=["TfmTransformerForConditionalGeneration"])
    config.save_pretrained(folder)
    write_history(folder)
    return folder


def test_card_text(folder):
    path = write_card(folder, RunRecord.from_dict(RECORD))
    assert path.read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8")
    card = ModelCard.load(path)
    assert card.data.eval_results[0].metric_value == 41.0249
    assert card.data.eval_results[0].dataset_type == "user/sentences"


def test_eval_results(folder):
    write_card(folder, RunRecord.from_dict(RECORD))
    path = folder / ".eval_results" / "user--sentences.yaml"
    first, second = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (first.dataset_id, first.task_id, first.value) == ("user/sentences", "short_test_bleu_lowercase", 41.0249)
    assert first.dataset_revision == RECORD["data"]["revision"]
    assert (first.notes, second.notes) == (BLEU, None)


def test_local_data_set_has_no_hub_metadata(folder):
    local = with_changes(data__path="/home/someone/data/pairs", data__revision=None, data__fingerprint="0a1b")
    text = write_card(folder, RunRecord.from_dict(local)).read_text()
    assert not (folder / ".eval_results").exists()
    card = ModelCard(text)
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_name == "pairs"
    assert "/home/someone" not in text
    assert "| revision | none: not on the Hub |" in text
    assert "| fingerprint | `0a1b` |" in text


def test_missing_values_are_shown_as_unknown(folder):
    bare = with_changes(data={"path": "user/sentences"}, arguments={}, metrics=[])
    bare["training"] = {"steps": 0, "epochs": 0, "seconds": 0}
    (folder / "history.jsonl").unlink()
    text = write_card(folder, RunRecord.from_dict(bare)).read_text()
    for line in (
        "license: unknown",
        "| revision | unknown |",
        "| fingerprint | unknown |",
        "| rows | unknown |",
        "| licence | unknown |",
        "| best evaluation | unknown |",
        "| memory (GB) | unknown |",
        "- Weights: unknown; not specified by the run.",
        "This run computed no test scores.",
        "There is no training curve: the run logged no losses.",
    ):
        assert line in text.splitlines(), line
    assert not (folder / "training_curve.png").exists()


def test_usage_matches_the_saved_model(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("auto_map")
    path.write_text(json.dumps(config))
    text = write_card(folder, RunRecord.from_dict(RECORD), model_id="user/tiny").read_text()
    assert "trust_remote_code" not in text
    assert "import hf_tfm  # registers the model with transformers\n" in text
    assert 'model_id = "user/tiny"' in text
    assert "Python files of this repository" not in text
    path.write_text(
        json.dumps({"model_type": "marian", "is_encoder_decoder": True, "architectures": ["MarianMTModel"]})
    )
    text = write_card(folder, RunRecord.from_dict(RECORD)).read_text()
    assert "import hf_tfm" not in text
    assert "AutoModelForSeq2SeqLM.from_pretrained(model_id)\n" in text


def test_curve_shows_losses_and_learning_rate(folder):
    losses, rates = plot_history(read_history(folder), "tiny").axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    assert set(lines) == {"training", "evaluation"}
    assert list(lines["evaluation"].get_xdata()) == [250, 500, 750, 1000]
    assert len(lines["training"].get_xdata()) == 20
    assert max(rates.get_lines()[0].get_ydata()) == 5e-3
    write_card(folder, RunRecord.from_dict(RECORD))
    image = imread(folder / "training_curve.png")
    assert image.shape[:2] == (600, 960)
    assert len({tuple(pixel) for pixel in image[::4, ::4, :3].reshape(-1, 3)}) > 10, "an empty picture"


def test_history_keeps_the_last_of_duplicate_rows_and_drops_a_partial_line(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "evaluation": {"loss": 9.0}}]
    rows += [{"step": 2, "loss": 1.0}]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "history.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 3, "lo')
    assert read_history(tmp_path) == [rows[0], rows[3], rows[2]]
    path.write_text(lines[0] + "\nnonsense\n" + lines[1])
    with pytest.raises(ValueError, match='line 2 is not a row with a "step": nonsense'):
        read_history(tmp_path)


def test_evaluations_of_a_finished_and_a_running_run(folder, tmp_path):
    """From the history, or from the results file where only that was kept; without values that are not finite."""
    rows = read_evaluations(folder)
    assert [row["step"] for row in rows] == [250, 500, 750, 1000]
    assert rows[0] == {"step": 250, "epoch": 1, "seconds": 125.0, "bleu": 10.0, "loss": rows[0]["loss"]}
    with open(folder / "history.jsonl", "a") as file:
        file.write('{"step": 1250, "epoch": 5, "evaluation": {"loss": NaN, "bleu": 50.0}}\n')
    rows = read_evaluations(folder)
    assert rows[-1] == {"step": 1250, "epoch": 5, "bleu": 50.0}
    RunRecord.from_dict(with_changes(evaluations=rows)).save(tmp_path)
    assert read_evaluations(tmp_path) == read_evaluations(tmp_path / "results.json") == rows
    with pytest.raises(ValueError, match="runs must be folders or results files of runs with evaluations, got"):
        read_evaluations(tmp_path / "none")


def test_scores_of_several_runs_in_one_picture(folder, tmp_path):
    rows = read_evaluations(folder)
    figure = plot_scores({"a": rows, "b": rows[:2]}, "bleu", "minutes")
    first, second = figure.axes[0].get_lines()
    assert (first.get_label(), second.get_label()) == ("a", "b")
    np.testing.assert_allclose(first.get_xydata(), [[step / 120, step / 25] for step in (250, 500, 750, 1000)])
    np.testing.assert_allclose(second.get_xydata(), first.get_xydata()[:2])
    assert list(plot_scores({"a": rows}, "bleu").axes[0].get_lines()[0].get_xdata()) == [250, 500, 750, 1000]
    with pytest.raises(ValueError, match="score must be one of bleu, loss for a, got 'AP'"):
        plot_scores({"a": rows}, "AP")
    del rows[1]["seconds"]
    with pytest.raises(ValueError, match="over must be steps for a, whose step 500 has no time, got 'minutes'"):
        plot_scores({"a": rows}, "bleu", "minutes")
    card = CARDS / "detr_digits-seed0.json"  # written before results held evaluations
    with pytest.raises(SystemExit, match="1"):
        cli.main(["show", "scores", str(folder), str(card), "--output", str(tmp_path / "s.png")])
    cli.main(
        ["show", "scores", str(folder), "--score", "bleu", "--over", "minutes", "--output", str(tmp_path / "s.png")]
    )
    assert imread(tmp_path / "s.png").shape[:2] == (600, 960)


def test_record_round_trip(tmp_path):
    record = RunRecord.from_dict(RECORD)
    assert record.save(tmp_path) == tmp_path / "results.json"
    assert RunRecord.load(tmp_path) == record
    optional = dict.fromkeys(("costs", "distillation", "compression", "evaluations"))
    assert RunRecord.load(tmp_path).to_dict() == {**RECORD, **optional}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": "many"}, "parameters must be a whole number, got 'many'"),
        ({"parameters": True}, "parameters must be a whole number, got True"),
        ({"parameters": -1}, "parameters must be at least 0, got -1"),
        ({"base_model": 3}, "base_model must be text or null, got 3"),
        ({"data__rows": {"train": "all"}}, r"data.rows.train must be a whole number or null, got 'all'"),
        ({"data__rows": {"train": -3}}, r"data.rows.train must be at least 0, got -3"),
        (
            {"data__licence": "mit"},
            "data has an unknown field licence; known: .*, fingerprint, image_column, .*, path",
        ),
        ({"metrics": [{"name": "bleu", "value": 1.0}]}, r"metrics\[0\] has no split"),
        (
            {"metrics": [{"name": "bleu", "value": None, "split": "t"}]},
            r"metrics\[0\].value must be a number, got None",
        ),
        (
            {"metrics": [{"name": "bleu", "value": float("nan"), "split": "t"}]},
            r"metrics\[0\].value must be finite, got nan",
        ),
        ({"training__seconds": "1 h"}, r"training.seconds must be a number, got '1 h'"),
        ({"versions": {"torch": 2}}, r"versions.torch must be text, got 2"),
        ({"started": "yesterday"}, 'started must be an ISO 8601 date with time zone, got "yesterday"'),
        ({"finished": "2026-11-21T12:10:00"}, "finished must be an ISO 8601 date with time zone"),
        ({"finished": "2026-11-21T09:00:00+00:00"}, "finished must not be before started"),
        ({"colour": "red"}, "results has an unknown field colour"),
    ],
)
def test_invalid_record_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(with_changes(**changes))


def test_invalid_file_is_named(tmp_path):
    record = with_changes()
    record.pop("command")
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"results\.json: results has no command"):
        RunRecord.load(tmp_path)


def test_versions_and_hardware_of_this_process():
    versions = collect_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "hf-tfm", "transformers", "sacrebleu"} <= versions.keys()
    hardware = describe_hardware("cpu", count=3)
    assert (hardware["device"], hardware["count"], hardware["threads"]) == ("cpu", 3, torch.get_num_threads())
    assert hardware["cpu_cores"] >= 1
    RunRecord.from_dict(with_changes(versions=versions, hardware=hardware))
