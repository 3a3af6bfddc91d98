"""Results files and model cards contain no local paths, and no markup from user-provided names."""

import pytest
import yaml
from huggingface_hub import ModelCard
from test_card import RECORD, with_changes

from hf_tfm import TfmTransformerConfig
from hf_tfm.hub.card import write_card
from hf_tfm.hub.portable import code, licence_id, plain, portable, portable_command
from hf_tfm.hub.results import RunRecord

EVIL = "x](https://evil.example) <img src=x onerror=alert(1)>\n# heading\n---\n| a | b |\n```\n![p](http://e/x.png)"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/jane/data/pairs", "pairs"),
        ("~/models/teacher", "teacher"),
        ("/home/jane/my data/pairs", "pairs"),
        ("user/name", "user/name"),
        ("runs/mae", "runs/mae"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("a score of 1 / 2", "a score of 1 / 2"),
        ("target tokens/s", "target tokens/s"),
        ('{"train": "/home/jane/a.parquet"}', '{"train": "a.parquet"}'),
        ({"files": ["/home/jane/a.csv", 3, None]}, {"files": ["a.csv", 3, None]}),
    ],
)
def test_paths_are_shortened(value, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.chdir(tmp_path)
    assert portable(value) == expected


def test_paths_below_the_working_directory_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable(str(tmp_path / "runs" / "mae")) == "runs/mae"
    assert portable(str(tmp_path)) == tmp_path.name


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "hf-tfm run x --config=/home/jane/a.yaml --output_dir '/home/jane/my runs/1' --seed 1"
    assert portable_command(command) == "hf-tfm run x --config=a.yaml --output_dir 1 --seed 1"


def test_results_and_card_have_no_local_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    home = "/home/jane/work"
    term = {
        "name": "kl",
        "weight": 1.0,
        "temperature": 2.0,
        "tokens": "all",
        "pairs": [["a", "b"]],
        "projection": None,
    }
    record = RunRecord.from_dict(
        with_changes(
            data__path=f"{home}/pairs",
            data__revision=None,
            base_model=f"{home}/base",
            command=f"hf-tfm run distill_task --teacher {home}/teacher --dataset_name ~/pairs",
            arguments={
                "output_dir": f"{home}/run",
                "model_name_or_path": "~/base",
                "data_files": {"train": f"{home}/a.csv"},
            },
        )
        | {"distillation": {"teacher": f"{home}/teacher", "student_layers": None, "cached": False, "terms": [term]}}
    )
    TfmTransformerConfig(architectures=["TfmTransformerForConditionalGeneration"]).save_pretrained(tmp_path)
    record.save(tmp_path)
    write_card(tmp_path, record)
    for name in ("results.json", "README.md"):
        text = (tmp_path / name).read_text()
        assert "jane" not in text and "~" not in text and "/home" not in text
        assert "teacher" in text and "pairs" in text and "base" in text


def test_user_provided_names_add_no_markup(tmp_path):
    """Names of data sets, splits, metrics, columns and licences; the rest of the card must not change."""
    changes = {"data__path": EVIL, "data__license": EVIL, "data__name": EVIL, "data__revision": EVIL, "task": EVIL}
    record = with_changes(**changes, model_type=EVIL, command=EVIL, base_model=EVIL)
    record["metrics"] = [{"name": EVIL, "value": 1.0, "split": EVIL, "signature": EVIL}]
    record["data"] |= {"fingerprint": {EVIL: EVIL}, "rows": {EVIL: 3}, "source_column": EVIL, "text_column": EVIL}
    record["arguments"] = {"license": EVIL, "text": EVIL}
    record["versions"], record["hardware"] = {EVIL: EVIL}, {EVIL: EVIL}
    record["training"] |= {"item": EVIL, "weights": EVIL, "best": {"metric": EVIL}}
    TfmTransformerConfig(architectures=["TfmTransformerForConditionalGeneration"]).save_pretrained(tmp_path)
    path = write_card(tmp_path, RunRecord.from_dict(record), model_id='a"\nimport os #')
    lines = path.read_text().splitlines()
    end = lines.index("---", 1)
    assert yaml.safe_load("\n".join(lines[1:end]))["license"] == "unknown"
    ModelCard.load(path)
    fenced, outside = False, []
    for line in lines[end + 1 :]:
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            outside.append(line)
    assert not fenced, "every fence is closed"
    assert [line for line in outside if line.startswith("#")][1:] == HEADINGS
    spans = ["".join(line.split("`")[::2]) for line in outside]  # without code spans, which contain no markup
    assert not [line for line in spans if "<img" in line or "](http" in line.replace("\\](", "")]
    assert "\nimport os" not in path.read_text()


HEADINGS = [
    *("## How to use", "## Task and data", "## Results", "## Training", "### Command", "### Hyper-parameters"),
    *("### Versions", "### Hardware", "## Licence"),
]


def test_licences_are_short_ids():
    assert licence_id("CC-BY-4.0") == "cc-by-4.0"
    for value in (None, "", EVIL, "all rights reserved", {"a": "b"}, ["mit"], "x" * 100):
        assert licence_id(value) is None


def test_text_is_one_line():
    assert plain("a\nb  *c* `d`") == r"a b \*c\* \`d\`"
    assert code("a`b\nc") == "`a'b c`"
    assert len(plain("x" * 1000)) == 200
    assert RECORD["data"]["path"] == plain(RECORD["data"]["path"])
