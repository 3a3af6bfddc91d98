"""The doctor command: arguments, table, report and exit status; a training run itself refuses a wrong id map."""

import json
import re
import runpy
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from planted import HEIGHT, MODEL, NAMES, WIDTH, as_splits, command_line, healthy, only, plant

from hf_tfm import TfmDetrForObjectDetection, cli
from hf_tfm.doctor import detection
from hf_tfm.doctor.findings import Finding, Sample, condensed, failed, findings_of, graded, ok, save, warning

ROOT = Path(__file__).parents[2]


def write(folder: Path) -> Path:
    """Write the healthy data as parquet."""
    folder.mkdir()
    for split, rows in as_splits(healthy()).items():
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def doctor(*argv) -> int:
    """Exit status of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "detection", *map(str, argv)])
    return ended.value.code


def test_healthy_data_passes(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert doctor(*command_line(data=write(tmp_path / "data")), "--quick", "--json", file) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "failed: nothing; warnings: 0"
    assert re.search(r"^ok +box_format +train: 72 boxes, .*; validation", printed, re.MULTILINE)
    report = json.loads(file.read_text())
    assert report["failed"] == [] and report["examined"]["recipe"] == "detection_train"
    assert {row["level"] for row in report["findings"]} == {"ok"}


def test_failed_check_is_printed_with_sample_and_remedy(tmp_path, capsys):
    data = write_coco(tmp_path / "coco", {"train": RIGHT, "validation": [(1, "green"), (2, "red"), (3, "blue")]})
    file = tmp_path / "report.json"
    assert doctor(*command_line(data=data, max_grad_norm=0), "--quick", "--json", file) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "failed: class_names; warnings: 1"
    margin = " " * 30
    assert re.search(
        rf"^failed +class_names +validation has .green. where .*\n({margin}.*\n)*{margin}sample: image 90\d of val",
        printed,
        re.M,
    )
    assert f"\n{margin}remedy: write the same list of categories" in printed
    report = json.loads(file.read_text())
    (row,) = [row for row in report["findings"] if row["level"] == "failed"]
    assert report["failed"] == ["class_names"] and row["sample"]["split"] == "validation" and row["remedy"]


def test_arguments_are_passed_to_the_recipe():
    own, args, given = detection.parse(["--data", "d", "--model", "runs/m", "--full", "--batch_size", "4"])
    assert own.full and (args.dataset_name, args.model_name_or_path, args.batch_size) == ("d", "runs/m", 4)
    assert given[:2] == ["--config", "finetune_small"]
    _, args, given = detection.parse(["--data", "d", "--model", MODEL + "}", "--model.num_queries", "7"])
    assert given[:2] == ["--config", "r50_300"] and args.validation_split == "validation"
    assert args.model_name_or_path is None and args.model["num_queries"] == 7
    _, args, given = detection.parse(["--config", "digits"])
    assert args.dataset_name == "digit-scenes-large" and given == ["--config", "digits"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --data, or a --config that names a dataset"),
        (["--data", "d", "--json", "/nowhere/report.json"], "there is no folder /nowhere"),
        (["--data", "d", "--num_querys", "5"], "num_querys"),
        (["--data", "d", "--config", "fly"], '--config "fly" is neither a file nor a preset'),
        (["--data", "d", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_invalid_arguments(given, message, capsys):
    assert doctor(*given) == 2
    assert message in capsys.readouterr().err


def test_help_lists_options(capsys):
    assert doctor("--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Other options are those of hf-tfm run detection_train" in printed and "--quick" in printed


# --- findings


def test_check_is_named_after_its_function():
    def fine(split):
        """All is well; or seems so."""
        return []

    def several(split):
        """Two."""
        yield ok(f"{split} one")
        yield graded(True, "two", "mend it", Sample(3, "train", (1.0, 2.5, 3.0, 4.0), "a.jpg"))

    assert list(findings_of(fine, "s", split="s")) == [Finding("ok", "All is well", check="fine", split="s")]
    found = list(findings_of(several, "s"))
    assert [finding.check for finding in found] == ["several", "several"]
    assert only(found, "several").remedy == "mend it"
    lines = list(found[1].lines())
    assert lines[0].split() == ["failed", "several", "two"]
    assert lines[1].strip() == "sample: image 3 of train, box [1, 2.5, 3, 4], a.jpg"
    assert graded(False, "a", "b").level == "warning"


def test_splits_without_findings_share_a_line():
    def of(level, split):
        return Finding(level, "m", check="c", split=split)

    assert [f.message for f in condensed([of("ok", "train"), of("ok", "test")])] == ["m; test as well"]
    mixed = [of("ok", "train"), of("failed", "test")]
    assert list(condensed(mixed)) == mixed
    apart = [failed("a", "r"), warning("b", "r")]
    assert list(condensed(apart)) == apart


# --- the training run itself


def write_coco(folder: Path, categories: dict[str, list[tuple[int, str]]], rows=None) -> Path:
    """Write the healthy data in COCO's layout, with the given categories for each split."""
    (folder / "annotations").mkdir(parents=True)
    for split, own in (rows or healthy()).items():
        (folder / split).mkdir()
        images, annotations = [], []
        for row in own:
            name = f"{row['image_id']}.png"
            (folder / split / name).write_bytes(row["image"])
            images.append({"id": row["image_id"], "file_name": name, "height": HEIGHT, "width": WIDTH})
            annotations += [
                {"image_id": row["image_id"], "bbox": o["bbox"], "category_id": o["category"] + 1}
                for o in row["objects"]
            ]
        content = {
            "images": images,
            "annotations": [annotation | {"id": i} for i, annotation in enumerate(annotations)],
            "categories": [{"id": i, "name": name} for i, name in categories[split]],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


RIGHT = list(enumerate(NAMES, start=1))
WRONG_ID_MAPS = {
    "another name": ([(1, "red"), (2, "green"), (3, "bleu")], "class_names", "1 of 3 categories are not classes"),
    "names in another order": (
        [(1, "green"), (2, "red"), (3, "blue")],
        "class_names",
        'categories are in another order in validation: it has "green" where train has "red"',
    ),
    "ids from 0": ([(0, "red"), (1, "green"), (2, "blue")], "data", "has category_id 3, which is not one of its 3"),
}


@pytest.mark.parametrize("name", WRONG_ID_MAPS)
def test_run_with_a_wrong_id_map_is_refused_before_training(name, tmp_path, monkeypatch, capsys):
    categories, check, message = WRONG_ID_MAPS[name]
    data = write_coco(tmp_path / "coco", {"train": RIGHT, "validation": categories})
    assert doctor(*command_line(data=data), "--quick") == 1
    assert f"failed: {check};" in capsys.readouterr().out

    def never(*args, **kwargs):
        raise AssertionError("the model was used")

    monkeypatch.setattr(TfmDetrForObjectDetection, "forward", never)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    given = [
        word if word != "--data" else "--dataset_name"
        for word in command_line(data=data, num_train_epochs=1, warmup_steps=0)
    ]
    main = runpy.run_path(str(ROOT / "recipes" / "detection_train.py"))["main"]
    with pytest.raises(ValueError, match=message):
        main([*given, "--output_dir", str(tmp_path / "run"), "--progress", "false"])
    assert not (tmp_path / "run" / "history.jsonl").exists(), "no training step must run"


def test_nonfinite_box_is_valid_json(tmp_path):
    file = tmp_path / "report.json"
    sample = Sample(1, "train", (1.0, float("nan"), 2.0, 3.0))
    save([failed("m", "r", sample)], str(file), {})
    (row,) = json.loads(file.read_text(), parse_constant=pytest.fail)["findings"]
    assert row["sample"]["box"] == [1.0, None, 2.0, 3.0]


def test_sample_files_are_named(tmp_path, capsys):
    rows = plant(lambda rows: rows["train"][3]["objects"][1].update(bbox=[200, 10, 20, 20]))
    data = write_coco(tmp_path / "coco", {"train": RIGHT, "validation": RIGHT}, rows)
    assert doctor(*command_line(data=data), "--quick") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"sample: image 103 of train, box [200, 10, 20, 20], {data / 'train' / '103.png'}" in printed


def test_missing_model_is_named(empty_hub, capsys):
    assert detection.main(["--data", "d", "--model", "runs/no-such-run"]) == 2
    assert 'model_name_or_path "runs/no-such-run" is neither a local folder' in capsys.readouterr().err
    assert any("runs/no-such-run" in path for _, path in empty_hub.requests)
