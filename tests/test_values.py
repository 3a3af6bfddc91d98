"""Values are validated against annotations: types, finite numbers, choices, lengths, in Python as in YAML."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from hf_tfm.data.augment import Augmentation, Mixing
from hf_tfm.data.language import Corpus
from hf_tfm.data.scenes import SceneAugmentation
from hf_tfm.distillation.substitution import Substitution
from hf_tfm.distillation.terms import Term
from hf_tfm.options import load_yaml
from hf_tfm.training import ImageBatchArguments, TokenBatchArguments, TrainingArguments
from hf_tfm.values import checked, closest, conform, conform_fields, one_line, shown

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "hint", "found"),
    [
        (3, int, 3),
        (np.int64(3), int, 3),
        (3, float, 3),
        (np.float32(0.5), float, 0.5),
        (True, bool, True),
        (Path("a/b"), str, "a/b"),
        (None, int | None, None),
        ([1, 2], tuple[int, int], (1, 2)),
        ((1, 2), int | tuple[int, int] | None, (1, 2)),
        (["a"], list[str], ["a"]),
        (("a",), list[str], ["a"]),
        ({"a": 1}, dict[str, float], {"a": 1}),
        ({"a": ["x"]}, dict[str, str | list[str]] | None, {"a": ["x"]}),
        ("adam", Literal["adam", "sgd"], "adam"),
        ({"flip": 0.0}, Augmentation, Augmentation(flip=0.0)),
        (object, Any, object),
    ],
)
def test_valid_values(value, hint, found):
    given = conform("x", value, hint)
    assert given == found and type(given) is type(found)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (2.5, int, "x must be an integer, got 2.5"),
        (2.0, int, "x must be an integer, got 2.0"),
        (True, int, "x must be an integer, got True"),
        ("2", int, 'x must be an integer, got "2"'),
        (2**63, int, "x must be a 64-bit integer, got 9223372036854775808"),
        (10**300, int, "x must be a 64-bit integer, got 1000"),
        (None, int, "x must be an integer, got None"),
        (NAN, float, "x must be a finite number, got nan"),
        (-INFINITE, float | None, "x must be a finite number or null, got -inf"),
        (10**400, float, "x must be a finite number, got 1000"),
        (True, float, "x must be a finite number, got True"),
        (1, bool, "x must be true or false, got 1"),
        ("yes", bool, 'x must be true or false, got "yes"'),
        ("", str, 'x must be a string that is not empty or blank, got ""'),
        (" \n", str | None, 'x must be a string that is not empty or blank, got " \\n"'),
        ("a\0b", str, 'x must not contain null characters, got "a\\u0000b"'),
        (5, str, "x must be a string, got 5"),
        (b"a", str, "x must be a string, got b'a'"),
        ("adma", Literal["adam", "sgd"], 'x must be one of adam, sgd, got "adma"; did you mean adam?'),
        ([0.9], tuple[float, float], "x must be a list of 2 finite numbers, got 1: [0.9]"),
        ([0.9, NAN], tuple[float, float], "x[1] must be a finite number, got nan"),
        ("ab", tuple[float, float], 'x must be a list of 2 finite numbers, got "ab"'),
        ([1, 2, 3], int | tuple[int, int], "x must be an integer or a list of 2 integers, got [1, 2, 3]"),
        ("test", list[str], 'x must be a list of strings, got "test"'),
        ([1], list[str], "x[0] must be a string, got 1"),
        ([""], list[str], 'x[0] must be a string that is not empty or blank, got ""'),
        (3, dict[str, int], "x must be a mapping of names to values, got 3"),
        ({"a": NAN}, dict[str, float], "x.a must be a finite number, got nan"),
        ({1: 2}, dict[str, int], "a key of x must be a string, got 1"),
        ({"flipp": 1}, Augmentation, "x.flipp is not an option; did you mean flip?"),
        ({"flip": "a"}, Augmentation, 'x.flip must be a finite number, got "a"'),
        ({}, Corpus, "x needs dataset_name, got {}"),
        (5, Augmentation, "x must be a mapping of names to values, got 5"),
    ],
)
def test_invalid_values(value, hint, message):
    with pytest.raises(ValueError) as caught:
        conform("x", value, hint)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_errors_are_short_and_on_one_line():
    assert len(shown("a" * 5000)) < 120 and "\n" not in shown("a\nb")
    assert shown(10**5000) == "an integer of more than 4,300 digits"
    assert one_line("a\n  b\n") == "a b"
    assert closest("learning_rat", ["seed", "learning_rate"]) == "; did you mean learning_rate?"
    assert closest("zzzz", ["seed"]) == ""


GROUPS = {
    Augmentation: {
        "scale": [(0.0, 1.0), (0.1, NAN), (0.1,), "ab"],
        "ratio": [(0.1, INFINITE)],
        "padding": [-1, 1.5, 10**9],
        "flip": [NAN, 2, "0.5", None],
        "rand_augment": [True, 10**9],
        "color_jitter": [5, INFINITE],
        "crop": ["middle", None],
    },
    Mixing: {"mixup": [NAN, -1, 1e300], "cutmix": ["1"], "probability": [1.5], "switch": [NAN]},
    SceneAugmentation: {
        "scales": [(), (0,), (2.5,), "480", (10**6,)],
        "max_size": [0, 10**9, None],
        "crop_size": [(5, 1), (1, 10**9), (3,)],
        "color_jitter": [INFINITE, -1],
        "vertical_flip": [NAN],
    },
    Substitution: {"copies": [0, 10**9, 1.5], "probability": [NAN, 0.0], "max_length": [3], "seed": [-1, 2**32]},
    Corpus: {"split": ["", None, 3]},
    Term: {"weight": [NAN, INFINITE, 0.0, "1", 1e300], "temperature": [INFINITE, -1.0], "tokens": ["each"]},
}
NEEDED = {Corpus: {"dataset_name": "d"}, Term: {"kind": "soft_target"}}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, name, value) for kind, table in GROUPS.items() for name, values in table.items() for value in values],
)
def test_invalid_option_groups(kind, name, value):
    with pytest.raises(ValueError, match=name):
        kind(**{**NEEDED.get(kind, {}), name: value})


WRONG = {
    "output_dir": ["", " ", None, 5],
    "overwrite_output_dir": ["true", 1],
    "seed": [-1, 2**32, 1.5, None, True],
    "num_train_epochs": [0, NAN, INFINITE, 1e12, "3"],
    "max_steps": [2.5, 0, -1, 10**18, "3", 2**80],
    "max_minutes": [0, -1, NAN, INFINITE, "3"],
    "ddp_timeout": [0, -1, 2.5, "3", 10**12],
    "dataloader_num_workers": [-1, 100_000, None],
    "optimizer": ["lamb", None],
    "learning_rate": [NAN, INFINITE, -1.0, 0, 1e9, "fast"],
    "layer_wise_lr_decay": [5, 0.0, NAN],
    "rate_factors": [{"backbone": INFINITE}, {"backbone": 0}, {"": 1.0}, 0.1],
    "lr_scheduler_type": ["nosuch", None],
    "lr_drop_ratio": [1.0, NAN],
    "min_lr_rate": [1.0, -0.1, NAN],
    "warmup_steps": [-1, 11, 1.5, INFINITE],
    "adam_betas": [(0.9,), (0.9, 0.98, 0.99), (0.9, 1.0), (0.9, NAN), None, 0.9],
    "adam_epsilon": [0.0, INFINITE, 2.0],
    "momentum": [1.0, NAN],
    "weight_decay": [-1, NAN, INFINITE, 1e6],
    "max_grad_norm": [INFINITE, -1],
    "mixed_precision": ["fp8", None],
    "torch_compile": [1, "yes"],
    "fsdp": [1, "yes"],
    "ema_decay": [1.0, NAN],
    "final_weights": ["median"],
    "eval_steps": [0, 1.5],
    "save_steps": [0, -3],
    "logging_steps": [0, None],
    "early_stopping_patience": [-1, 1.5],
    "save_total_limit": [0],
    "report_to": ["tensorboard", ["mlflow"]],
    "run_name": ["", 3],
    "trust_remote_code": ["yes", None],
    "license": ["", 3],
    "progress": ["maybe", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_python_arguments_are_validated_like_the_command_line(name, value):
    steps = {} if name == "num_train_epochs" else {"max_steps": 10}
    with pytest.raises(ValueError, match=name) as caught:
        TrainingArguments(**{"output_dir": "o", **steps, name: value})
    assert "\n" not in str(caught.value)


def test_every_option_has_an_invalid_value_in_the_table():
    untested = {"gradient_checkpointing", "average_checkpoints", "metric_for_best_model", "max_nonfinite_steps"}
    assert {one.name for one in dataclasses.fields(TrainingArguments)} == WRONG.keys() | untested


def test_values_near_the_limits_are_accepted():
    args = TrainingArguments(
        output_dir=Path("o"), max_steps=10, warmup_steps=10, layer_wise_lr_decay=1, adam_betas=[0, 0.5], seed=2**32 - 1
    )
    assert (args.output_dir, args.adam_betas) == ("o", (0, 0.5))
    assert args.warmup(10) == 10
    with pytest.raises(ValueError, match=r"warmup_steps must be at most the 9 steps of the run .*, got 10"):
        args.warmup(9)
    default = TrainingArguments(output_dir="o", num_train_epochs=1, eval_steps=10**6)
    assert [default.warmup(steps) for steps in (3, 50, 10**6)] == [0, 5, 1000]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 2, "warmup_steps": 1}, "give at most one of warmup_steps and warmup_epochs, got 1 and 2"),
        (
            {"max_steps": None, "num_train_epochs": 2, "warmup_epochs": 3},
            "warmup_epochs must be at most num_train_epochs = 2",
        ),
        ({"batch_size": 10**9}, "batch_size must be at most 10,000,000, got 1000000000"),
        ({"learning_rate": None, "base_learning_rate": INFINITE}, "base_learning_rate must be a finite number"),
        ({"weight_decay": 100, "learning_rate": 0.1}, "weight_decay times learning_rate must be below 1"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageBatchArguments(**{"output_dir": "o", "max_steps": 10, "learning_rate": 0.1, **options})


def test_token_batch_options():
    for name, value in {"batch_tokens": 0, "micro_batch_tokens": 1.5}.items():
        with pytest.raises(ValueError, match=name):
            TokenBatchArguments(output_dir="o", max_steps=1, **{name: value})


@dataclass(frozen=True)
class Group:
    items: tuple[float, ...] = ()
    corpora: list[Corpus] = field(default_factory=list)

    def __post_init__(self):
        conform_fields(self)


def test_fields_are_converted_to_their_annotations():
    group = Group(items=[1, 2], corpora=[{"dataset_name": "d"}])
    assert group.items == (1, 2) and group.corpora == [Corpus(dataset_name="d")]
    with pytest.raises(ValueError, match=r"corpora\[0\].splitt is not an option; did you mean split?"):
        Group(corpora=[{"dataset_name": "d", "splitt": "x"}])


@checked(tokens=(1, None), share=(0, 1))
def scored(model: str, tokens: int = 8, share: float | None = None, **others: int) -> tuple:
    """An evaluation function."""
    return model, tokens, share, others


def test_function_arguments_are_validated():
    assert scored(Path("m"), share=1, more=2) == ("m", 8, 1, {"more": 2})
    assert scored.__doc__ == "An evaluation function."
    for options, message in (
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"tokens": 1.5}, "tokens must be an integer, got 1.5"),
        ({"share": 1.5}, "share must be at most 1, got 1.5"),
        ({"share": NAN}, "share must be a finite number or null, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            scored("m", **options)
    with pytest.raises(ValueError, match="model must be a string that is not empty"):
        scored("")


def bomb() -> str:
    """Nested lists whose aliases expand to ten billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", 'f, line 3: duplicate key "a"'),
        ("a: {b: 1, b: 2}", 'f, line 1: duplicate key "b"'),
        ("a: !!python/object/apply:os.system [id]", "f, line 1: the tag .*os.system.* is not allowed"),
        ("a: !custom 1", "f, line 1: the tag .*custom.* is not allowed"),
        ("a: [1", "f, line 1: invalid YAML: expected ',' or ']'"),
        ("a: 1\n--- \nb: 2", "f, line 2: invalid YAML: but found another document"),
        ("a: &x [*x]", "f, line 1: lists and mappings are nested more than 20 levels deep"),
        ("a: " + "[" * 5000, "f"),
        (bomb(), "f: more than 10,000 values with aliases expanded"),
        ("a: \x01", "f"),
    ],
)
def test_invalid_yaml_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(text, "f")
    assert "\n" not in str(caught.value)


def test_yaml_numbers_are_read_as_on_the_command_line():
    text = "a: 1e-3\nb: .5\nc: 1_000\nd: 2020-01-01\ne: null\nf: .inf\nbase: &base {x: 1}\nother: {<<: *base}"
    found = load_yaml(text, "f")
    assert found == {
        **{"a": 1e-3, "b": 0.5, "c": 1000, "d": "2020-01-01", "e": None, "f": INFINITE},
        **{"base": {"x": 1}, "other": {"x": 1}},
    }


def test_home_directories_are_expanded_only_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("output_dir", "dataset_name", "model_name_or_path", "cache", "more_texts[0].dataset_name"):
        assert conform(name, "~/a", str | None) == "/home/someone/a"
    assert conform("data_files", {"train": ["~/a.csv"]}, dict[str, str | list[str]]) == {
        "train": ["/home/someone/a.csv"]
    }
    assert conform("run_name", "~/a", str) == "~/a"
    with pytest.raises(ValueError, match=r'output_dir "~no-such-user/a": there is no such user'):
        conform("output_dir", "~no-such-user/a", str)
    assert TrainingArguments(output_dir="~", max_steps=1).output_dir == "/home/someone"
