"""The translation recipe: every kind of model and data for two steps, its results, and refused options."""

import json
import shlex

import pytest
import torch
from recipe_helpers import TINY, command_line, fresh_state, record, run_recipe, write_data
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_tfm import cli
from hf_tfm.hub.portable import portable_command
from hf_tfm.hub.results import read_history

LONG = {"en": "one hundred and one " * 40, "de": "einhunderteins"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run of 30 steps, and its command line."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    argv = command_line(
        data, folder, max_steps=30, eval_steps=10, logging_steps=10, license="apache-2.0", learning_rate=0.01
    )
    assert run_recipe(*argv) == 0
    return folder, argv


RNN = "{embedding_size: 16, encoder_hidden_size: 8, hidden_size: 16}"
VARIANTS = {
    "post_norm": {},
    "pre_norm_learned_gelu": {
        "model": TINY[:-1] + ", norm_first: true, position_embedding_type: learned, max_position_embeddings: 100, "
        "hidden_act: gelu}",
    },
    "additive": {"model": TINY[:-1] + ", attention_score: additive}", "dataloader_num_workers": 1},
    "mask_predict": {"model": TINY[:-1] + ", decoding: mask_predict}", "iterations": 2, "micro_batch_tokens": 200},
    "rnn": {"architecture": "rnn_seq2seq", "model": RNN, "mixed_precision": "bf16", "micro_batch_tokens": 200},
    "luong_lstm": {"architecture": "rnn_seq2seq", "model": RNN[:-1] + ", cell: lstm, attention_score: dot}"},
    "streaming": {"streaming": "true", "dataloader_num_workers": 1},
    "bf16": {"mixed_precision": "bf16", "metric_for_best_model": "chrf", "eval_steps": 1},
    "epochs": {
        "max_steps": "null",
        "num_train_epochs": 0.4,
        "ema_decay": 0.5,
        "final_weights": "ema",
        "lowercase": "true",
    },
}


SLOW = (
    "post_norm",
    "additive",
    "luong_lstm",
    "bf16",
)  # other tests of this file train such models, or one that differs more


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in VARIANTS]
)
def test_two_steps(tmp_path, name):
    # One test sentence is longer than the learned position table.
    data = write_data(tmp_path / "pairs", {105: LONG})
    assert run_recipe(*command_line(data, tmp_path / "run", **VARIANTS[name])) == 0
    results = record(tmp_path / "run")
    assert results.training["steps"] == 2
    assert [(row["split"], row["name"]) for row in results.metrics] == [
        ("test", metric) for metric in ("bleu", "bleu_lowercase", "chrf", "chrf_lowercase")
    ]
    fresh_state()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").eval()
    assert model.generate(**tokenizer(["one"], return_tensors="pt")).shape[0] == 1
    code = f"modeling_{model.config.model_type.removeprefix('tfm_')}.py"
    for file in ("README.md", "generation_config.json", code, "training_curve.png"):
        assert (tmp_path / "run" / file).is_file()


@pytest.mark.slow  # test_two_steps trains such a model, and other recipes resume
def test_recurrent_run_resumes_bit_equal_and_is_trained_further(data, tmp_path):
    options = {**VARIANTS["rnn"], "lr_scheduler_type": "constant", "eval_steps": 2, "metrics": "[chrf]"}
    assert run_recipe(*command_line(data, tmp_path / "whole", **options, max_steps=4)) == 0
    for steps in (2, 4):
        assert run_recipe(*command_line(data, tmp_path / "cut", **options, max_steps=steps)) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    further = {"model_name_or_path": tmp_path / "whole", "metrics": "[chrf]"}
    assert run_recipe(*command_line(data, tmp_path / "further", **further)) == 0
    assert record(tmp_path / "further").model_type == "tfm_rnn_seq2seq"


def test_results_are_complete(trained, data):
    folder, argv = trained
    results = record(folder)
    assert results.task == "translation"
    assert results.model_type == "tfm_transformer"
    assert results.parameters == sum(p.numel() for p in AutoModelForSeq2SeqLM.from_pretrained(folder).parameters())
    assert results.base_model is None
    fingerprints = results.data.pop("fingerprint")
    assert set(fingerprints) == {"train", "validation", "test"}
    assert len(set(fingerprints.values())) == 3
    assert results.data == {
        "path": data.name,
        "name": None,
        "revision": None,
        "on_hub": False,
        "license": "cc0-1.0",
        "source_column": "en",
        "target_column": "de",
        "rows": {"train": 90, "validation": 15, "test": 10},
    }
    assert results.arguments["max_steps"] == 30 and results.arguments["license"] == "apache-2.0"
    assert results.command == portable_command(shlex.join(["hf-tfm", "run", "translation_train", *argv]))
    training = results.training
    assert training["steps"] == 30
    # 90 rows give 4 or 5 steps of 400 tokens, so 30 steps are 6 to 8 epochs.
    assert 6 < training["epochs"] < 8 and training["epochs"] != round(training["epochs"])
    assert training["item"] == "target tokens" and training["items_per_second"] > 0
    assert training["best"]["metric"] == "loss" and training["best"]["step"] in (10, 20, 30)
    assert training["skipped_steps"] == 0 and training["weights"] == "best"
    assert results.hardware["device"] == "cpu" and results.hardware["count"] == 1
    assert {"python", "torch", "transformers", "hf-tfm"} <= results.versions.keys()
    losses = {row["step"]: row["loss"] for row in read_history(folder) if "loss" in row}
    assert list(losses) == [10, 20, 30]
    assert losses[30] < losses[10]


def test_stored_command_repeats_the_run(trained, data, monkeypatch):
    folder, _ = trained
    before = record(folder)
    weights = (folder / "model.safetensors").read_bytes()
    fresh_state()
    # The command has paths relative to the working directory, or only their last component.
    monkeypatch.chdir(folder.parent)
    program, *argv = [str(data) if word == data.name else word for word in shlex.split(before.command)]
    assert program == "hf-tfm"
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 0
    after = record(folder)
    assert after.metrics == before.metrics
    assert after.training == before.training
    assert (folder / "model.safetensors").read_bytes() == weights


def test_scores_are_those_of_the_saved_model(trained, data):
    folder, _ = trained
    from hf_tfm.tasks.evaluation import evaluate

    fresh_state()
    again = evaluate(str(folder), dataset_name=str(data), split="test", progress=False)
    assert [row["value"] for row in again["metrics"]] == [row["value"] for row in record(folder).metrics]


def test_bf16_model_is_scored_as_saved(data, tmp_path):
    """Autocast ends with training: the loaded model reproduces the scores in results.json."""
    from hf_tfm.tasks.evaluation import evaluate

    run_recipe(*command_line(data, tmp_path / "run", mixed_precision="bf16", max_steps=20, learning_rate=0.01))
    fresh_state()
    again = evaluate(str(tmp_path / "run"), dataset_name=str(data), split="test", progress=False)
    assert [row["value"] for row in again["metrics"]] == [row["value"] for row in record(tmp_path / "run").metrics]


def test_initialization_from_a_saved_model(trained, data, tmp_path):
    folder, _ = trained
    run_recipe(*command_line(data, tmp_path / "run", model_name_or_path=folder, learning_rate=1e-9))
    results = record(tmp_path / "run")
    assert results.base_model == folder.name
    models = [AutoModelForSeq2SeqLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "run")]
    assert max((models[0][name] - models[1][name]).abs().max() for name in models[0]) < 1e-6
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_warm_start_of_floater_from_sinusoidal_positions(trained, data, tmp_path):
    """The model is the same until it is trained, except for new weights, which are trained."""
    folder, _ = trained
    options = {"model": "{position_embedding_type: floater}", "rate_factors": "{flow: 3}", "learning_rate": 1e-9}
    assert run_recipe(*command_line(data, tmp_path / "run", model_name_or_path=folder, **options)) == 0
    first, model = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (folder, tmp_path / "run"))
    assert model.config.position_embedding_type == "floater" and first.config.position_embedding_type == "sinusoidal"
    weights, found = first.state_dict(), model.state_dict()
    assert max((found[name] - weights[name]).abs().max() for name in weights) < 1e-6
    new = found.keys() - weights.keys()
    assert new and all("flow" in name for name in new)
    assert all(found[name].any() for name in new if name.endswith(("start", "down_weight")))
    fresh_state()
    with pytest.raises(ValueError, match=r"model\.hidden is not a field of TfmTransformerConfig"):
        run_recipe(*command_line(data, tmp_path / "other", model_name_or_path=folder, model="{hidden: 3}"))


def test_short_training_pairs_and_scores_by_length(data, tmp_path):
    """Pairs with more words are not trained on; they can be scored, in the run and later, by bins of length."""
    from hf_tfm.tasks.evaluation import evaluate

    options = {"max_words": 5, "validation_split": "null", "holdout": 10, "num_beams": 1}
    scored = {"test_splits": "[test, long]", "length_bins": "[3, 5]", "metrics": "[bleu]"}
    assert run_recipe(*command_line(data, tmp_path / "run", **options, **scored)) == 0
    results = record(tmp_path / "run")
    # 34 of the 90 training pairs have at most 5 words; the others have 6.
    assert results.data["rows"] == {"train": 24, "holdout": 10, "test": 10, "long": 56}
    scores = {(row["split"], row["name"]): row["value"] for row in results.metrics}
    sentences = {split: value for (split, name), value in scores.items() if name == "sentences"}
    parts = {"test, 3 to 4 words": 2, "test, 5 words and more": 8, "long, 5 words and more": 56}
    assert sentences == {"test": 10, "long": 56, **parts}
    assert all(scores[split, "length_ratio"] > 0 and (split, "bleu") in scores for split in sentences)
    assert scores["long", "bleu"] == scores["long, 5 words and more", "bleu"]
    assert "| long, 5 words and more | sentences | 56 |" in (tmp_path / "run" / "README.md").read_text()
    fresh_state()
    source = {"dataset_name": str(data), "split": "train", "length_bins": [3, 5], "metrics": ["bleu"]}
    again = evaluate(str(tmp_path / "run"), **source, min_words=6, progress=False)
    assert again["rows"] == 56
    expected = [row["value"] for row in results.metrics if row["split"].startswith("long")]
    assert [row["value"] for row in again["metrics"]] == expected


def copy_of(folder, to, model=None, **config):
    """A copy of a saved model with a changed weight or configuration field."""
    model = model or AutoModelForSeq2SeqLM.from_pretrained(folder)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def test_incompatible_initial_model_is_refused(trained, data, tmp_path):
    from transformers import MarianConfig, MarianMTModel

    folder, _ = trained
    small = AutoModelForSeq2SeqLM.from_pretrained(folder)
    small.resize_token_embeddings(280)
    tiny = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "pad_token_id": 0}
    marian = MarianMTModel(MarianConfig(vocab_size=300, **tiny, **heads))
    cases = {
        "marian model; a translation model needs one of tfm_transformer": copy_of(folder, tmp_path / "marian", marian),
        "has 280 tokens, fewer than the 300 of its tokenizer": copy_of(folder, tmp_path / "small", small),
        "pad_token_id is 7 in the model, 0 in the tokenizer": copy_of(folder, tmp_path / "pad", pad_token_id=7),
    }
    for number, (message, start) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            run_recipe(*command_line(data, tmp_path / f"run{number}", model_name_or_path=start))
        assert not (tmp_path / f"run{number}" / "checkpoints").exists()


def test_incompatible_tokenizer_is_refused(trained, data, tmp_path):
    folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="does not end a text with its eos_token"):
        run_recipe(*command_line(data, tmp_path / "run", tokenizer=tmp_path / "endless"))
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token=None)
    tokenizer.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ValueError, match="has no pad_token"):
        run_recipe(*command_line(data, tmp_path / "other", tokenizer=tmp_path / "unpadded"))


def test_existing_tokenizer(trained, data, tmp_path):
    folder, _ = trained
    model = TINY[:-1] + ", vocab_size: 320}"  # more embeddings than the tokenizer's 300 tokens are allowed
    run_recipe(*command_line(data, tmp_path / "run", tokenizer=folder, model=model))
    assert AutoConfig.from_pretrained(tmp_path / "run").vocab_size == 320
    with pytest.raises(ValueError, match="vocab_size must be at least the tokenizer's 300 tokens, got 100"):
        run_recipe(*command_line(data, tmp_path / "less", tokenizer=folder, model=TINY[:-1] + ", vocab_size: 100}"))


def test_changed_data_or_options_are_another_run(trained, data, tmp_path):
    folder, argv = trained
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for more, named in (
        (["--seed", "1"], "seed: 0 there, 1 now"),
        (["--learning_rate", "0.02"], "learning_rate: 0.01 there, 0.02 now"),
        (["--source_column", "de", "--target_column", "en"], "source_column: 'en' there, 'de' now"),
    ):
        with pytest.raises(ValueError, match=f"holds another run .*{named}"):
            run_recipe(*argv, *more)
    content = {path: path.read_bytes() for path in data.iterdir()}
    write_data(data, {3: {"en": "changed", "de": "geändert"}})
    try:
        with pytest.raises(ValueError, match=r"holds another run .*data: "):
            run_recipe(*argv)
    finally:
        for path, value in content.items():
            path.write_bytes(value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_overwriting_another_run(data, tmp_path):
    run_recipe(*command_line(data, tmp_path / "run"))
    run_recipe(*command_line(data, tmp_path / "run", seed=1, overwrite_output_dir="true"))
    assert record(tmp_path / "run").arguments["seed"] == 1


# --- refused before training


def parser_error(capsys, *argv):
    """Error message for a command line that the parser rejects."""
    with pytest.raises(SystemExit) as ended:
        run_recipe(*argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "{hidden: 3}"}, "model.hidden is not a field of TfmTransformerConfig"),
        (
            {"architecture": "rnn_seq2seq", "model": "{cell: rnn}"},
            'model: cell must be one of gru, lstm, got "rnn"',
        ),
        (
            {"architecture": "rnn_seq2seq", "model": "{attention_score: dot, hidden_size: 7}"},
            "model: hidden_size must be 2 * encoder_hidden_size = 320 for attention_score",
        ),
        (
            {"architecture": "rnn_seq2seq", "model": "{}", "size": "big"},
            "size must be one of tiny, tutorial, base, got",
        ),
        (
            {"model": "{pad_token_id: 3}"},
            "model.pad_token_id is not a field of TfmTransformerConfig that can be chosen",
        ),
        ({"model": "{dropout: a lot}"}, "dropout"),
        ({"model": "{dropout: 1.5}"}, "dropout must be in [0, 1), got 1.5"),
        ({"model": "{hidden_size: 30, num_attention_heads: 4}"}, "hidden_size must be a multiple"),
        ({"model": "{hidden_act: nope}"}, "hidden_act"),
        (
            {"model": "{position_embedding_type: learned, max_position_embeddings: 64}"},
            "max_length must be at most max_position_embeddings of a model with learned positions, got 100 and 64",
        ),
        ({"size": "huge"}, "size"),
        ({"metrics": "[bluster]"}, "metrics"),
        ({"metric_for_best_model": "bluster"}, "metric_for_best_model"),
        ({"num_train_epochs": 3}, "exactly one of num_train_epochs and max_steps"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"max_words": 0}, "max_words must be at least 1, got 0"),
        ({"length_bins": "[15, 12]"}, "length_bins must be increasing numbers of words, at least 1, got [15, 12]"),
        (
            {"streaming": "true", "max_words": 5, "test_splits": "[long]"},
            'test_splits "long" is a part of train_split, which streaming reads only once',
        ),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"streaming": "true", "max_steps": "null", "num_train_epochs": 1}, "streaming needs max_steps"),
        ({"streaming": "true", "validation_split": "train"}, 'train_split "train" cannot be scored too'),
        ({"streaming": "true", "batch_tokens": 50}, "max_length must be at most the 50 tokens of a batch, got 100"),
        ({"model_name_or_path": "x", "tokenizer": "y"}, "model_name_or_path has its own tokenizer: give no tokenizer"),
        ({"tokenizer": "y", "lowercase": "true"}, "lowercase applies to a trained tokenizer"),
    ],
)
def test_incompatible_options_are_refused(tmp_path, capsys, data, options, named):
    message = parser_error(capsys, *command_line(data, tmp_path / "run", **options))
    assert named in message.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"test_splits": "[tset]"},
            'test_splits "tset" is not a split of the data set; it has train, validation, test',
        ),
        ({"validation_split": "valid"}, 'validation_split "valid" is not a split'),
        ({"source_column": "fr"}, 'source_column "fr" is not a column of the data set; it has en, de'),
        ({"dataset_name": "/nowhere/at/all"}, "cannot be loaded"),
        ({"vocab_size": 100}, "vocab_size must be at least 261"),
        ({"max_words": 5}, '"validation" has no pair whose longer side has at most 5 words'),
        ({"test_splits": "[long]"}, 'test_splits "long" is not a split of the data set'),
        ({"max_length": 3}, "all 90 pairs are longer than max_length = 3 tokens"),
        ({"batch_tokens": 20}, "batch_tokens must be at least the length of the longest sample, got 20"),
        ({"micro_batch_tokens": 20}, "micro_batch_tokens must be at least the length of the longest sample, got 20"),
        ({"mixed_precision": "fp16"}, "fp16"),
    ],
)
def test_incompatible_data_is_refused(tmp_path, data, options, named):
    with pytest.raises(ValueError) as caught:
        run_recipe(*command_line(data, tmp_path / "run", **options))
    assert named in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unknown_split_leaves_no_folder(tmp_path, data):
    with pytest.raises(ValueError, match="is not a split"):
        run_recipe(*command_line(data, tmp_path / "run", test_splits="[tset]"))
    assert not (tmp_path / "run").exists()


def test_printed_config_runs(tmp_path, data, capsys):
    argv = command_line(data, tmp_path / "run", model=TINY)
    with pytest.raises(SystemExit) as ended:
        run_recipe(*argv, "--print_config")
    assert ended.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert run_recipe("--config", str(tmp_path / "printed.yaml")) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["training"]["steps"] == 2
