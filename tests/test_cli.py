"""The command line, called as main(argv) in this process."""

import json
import re
import shutil
import subprocess
from functools import partial

import numpy as np
import processes
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset, DatasetDict
from matplotlib.image import imread
from PIL import Image
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, ViTImageProcessor

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    TfmViTConfig,
    TfmViTForImageClassification,
    cli,
    quickstart,
)
from hf_tfm.data import images as image_data
from hf_tfm.data import text
from hf_tfm.data.digit_scenes import digit_scenes
from hf_tfm.data.embedded import DIGIT_SCENES
from hf_tfm.data.number_words import spell

ROWS = [spell(41 * i + 1) for i in range(30)]


def hf_tfm(*argv: str):
    """Run a command after resetting accelerate's state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    cli.main([str(word) for word in argv])


@pytest.fixture
def refused(capsys):
    """A function that runs a failing command and returns the last line of standard error (all of it for argparse)."""

    def run(*argv: str, status: int = 1) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            hf_tfm(*argv)
        assert ended.value.code == status
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message.splitlines()[-1] if status == 1 else message

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in {"train": ROWS, "test": ROWS[:7]}.items():
        DatasetDict({name: Dataset.from_list(rows)})[name].to_parquet(folder / f"{name}.parquet")
    return folder


def save_model(folder, **fields):
    """A tiny random model with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = text.train_tokenizer((row[side] for row in ROWS for side in ("en", "de")), 280)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    depth = {"num_encoder_layers": 2, "num_decoder_layers": 1}
    config = TfmTransformerConfig(vocab_size=len(tokenizer), **sizes, **depth, **fields)
    model = TfmTransformerForConditionalGeneration(config)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model.generation_config = GenerationConfig(max_length=20, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


# --- evaluate


def test_evaluate(model, data, tmp_path, capsys):
    file = tmp_path / "scores.json"
    options = ("--metrics", "[bleu,bleu_lowercase,chrf,exact_match]", "--output", file, "--progress", "false")
    hf_tfm("evaluate", model, "--dataset_name", data, "--split", "test", *options)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["test", n] for n in ("bleu", "bleu_lowercase", "chrf", "exact_match")]
    assert "version:" in lines[0][3]  # the metric's signature
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["metrics"]] == [line[1] for line in lines]
    assert result["rows"] == len(result["predictions"]) == 7
    assert result["predictions"][0]["source"] == ROWS[0]["en"]
    assert result["fingerprint"] == text.fingerprint(text.text_pairs(text.load_splits(str(data))["test"], "en", "de"))
    loaded, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    output = loaded.generate(**tokenizer([ROWS[3]["en"]], return_tensors="pt"), max_length=20)
    assert result["predictions"][3]["translation"] == tokenizer.decode(output[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "options",
    [("--num_beams", "2", "--length_penalty", "0.6"), ("--mixed_precision", "bf16"), ("--max_samples", "2")],
)
def test_evaluate_options(model, data, tmp_path, capsys, options):
    file = tmp_path / "scores.json"
    hf_tfm("evaluate", model, "--dataset_name", data, "--progress", "false", "--output", file, *options)
    result = json.loads(file.read_text())
    assert result["rows"] == (2 if "--max_samples" in options else 7)
    assert result["generation"] == ({"num_beams": 2, "length_penalty": 0.6} if "--num_beams" in options else {})


def test_evaluate_other_models_and_files(model, data, tmp_path, capsys):
    """A file given by format, a mask-predict model with its own option, and transformers' Marian."""
    masked = save_model(tmp_path / "masked", decoding="mask_predict")
    files = json.dumps({"held_out": str(data / "test.parquet")})
    where = ("--dataset_name", "parquet", "--data_files", files, "--split", "held_out", "--progress", "false")
    hf_tfm("evaluate", masked, *where, "--iterations", "2")
    hf_tfm("convert", model, "--to", "marian", "--output_dir", tmp_path / "marian")
    hf_tfm("evaluate", tmp_path / "marian", *where)
    assert capsys.readouterr().out.count("held_out  bleu ") == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--split", "tset"), 'split "tset" is not a split of the data set; it has train, test'),
        (("--source_column", "fr"), 'source_column "fr" is not a column of the data set; it has en, de'),
        (("--num_beams", "0"), "num_beams must be at least 1, got 0"),
        (("--max_samples", "-1"), "max_samples must be at least 1, got -1"),
        (("--output", "/nowhere/scores.json"), "there is no folder /nowhere"),
        (("--dataset_name", "/nowhere"), "cannot be loaded"),
        (("--batch_tokens", "0"), "batch_tokens must be at least 1, got 0"),
        (("--batch_tokens", "1000000000"), "batch_tokens must be at most 16,777,216, got 1000000000"),
        (("--num_beams", "100000"), "num_beams must be at most 1,024, got 100000"),
        (("--num_beams", "1000"), "num_beams must be at most the vocabulary size 280, got 1000"),
        (("--iterations", "5"), "iterations is for mask-predict models"),
        (("--length_penalty", ".inf"), "length_penalty must be a finite number or null, got inf"),
        (("--metrics", "[]"), "metrics must contain at least one metric"),
        (("--output", "/"), "output / is a folder: give the name of a file"),
        (("--dataset_name", ""), "dataset_name must be a name, got ''"),
    ],
)
def test_evaluate_errors(model, data, options, named, monkeypatch, refused):
    monkeypatch.setattr("hf_tfm.tasks.translation.translate", None)  # the error comes first
    message = refused("evaluate", model, "--dataset_name", data, *options)
    assert message.startswith("hf-tfm evaluate: ")
    assert named in message


def test_evaluate_a_missing_model(data, refused):
    assert "nowhere" in refused("evaluate", "/nowhere", "--dataset_name", data)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("evaluate", "m", "--spli", "test"), "spli"),  # abbreviations are not accepted
        (("evaluate", "m"), "dataset_name"),
        (("evaluate", "m", "--dataset_name", "d", "--batch_tokens", "many"), "batch_tokens"),
        (("evaluate", "m", "--dataset_name", "d", "--metrics", "[bluster]"), "each one of bleu, bleu_lowercase, chrf"),
        (("evaluate", "m", "--dataset_name", "d", "--mixed_precision", "fp8"), 'one of no, bf16, got "fp8"'),
        (
            ("evaluate", "m", "--dataset_name", "d", "--precision", "bf16"),
            "--precision is now called --mixed_precision",
        ),
        (("fly",), "fly"),
        ((), "a command must be given, one of run, evaluate, convert, compress, export"),
    ],
)
def test_parser_errors_name_the_argument(words, named, refused):
    assert named in refused(*words, status=2)


# --- the other commands


def test_show_attention(model, tmp_path, capsys):
    hf_tfm("show", "attention", model, "--text", ROWS[3]["en"], "--output_dir", tmp_path / "maps", "--layers", "[0]")
    paths = capsys.readouterr().out.split()
    assert len(paths) == 3  # encoder, decoder, cross
    for path in paths:
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def image_models(tmp_path_factory):
    """A tiny classifier and a masked autoencoder with their image processor, two photos, and a data set of them."""
    folder = tmp_path_factory.mktemp("images")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"image_size": 16, "patch_size": 4}
    decoder = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    decoder = {f"decoder_{name}": value for name, value in decoder.items()}
    TfmViTForImageClassification(TfmViTConfig(**sizes)).save_pretrained(folder / "vit")
    TfmMAEForPreTraining(TfmMAEConfig(**sizes, **decoder)).save_pretrained(folder / "mae")
    for name in ("vit", "mae"):
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / name)
    photos = [Image.fromarray(np.full((20, 20, 3), shade, dtype=np.uint8)) for shade in (60, 190)]
    for number, photo in enumerate(photos):
        photo.save(folder / f"{number}.png")
    Dataset.from_list([{"image": photo} for photo in photos]).to_parquet(folder / "rows" / "test.parquet")
    return folder


def plots(capsys) -> list[tuple[int, ...]]:
    """Shapes of the plots that a command has printed, one path per line."""
    return [imread(path).shape for path in capsys.readouterr().out.split()]


@pytest.mark.parametrize("name", ["vit", "mae"])
def test_show_attention_over_an_image(name, image_models, tmp_path, capsys):
    where = ("--output_dir", tmp_path / "maps")
    hf_tfm("show", "attention", image_models / name, image_models / "0.png", *where, "--layers", "[-1]")
    short, _ = plots(capsys)
    hf_tfm("show", "attention", image_models / name, f"{image_models / 'rows'}:test:1", *where, "--query", "mean")
    tall, _ = plots(capsys)
    assert short[0] < tall[0]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["heads.png", "rollout.png"]


def test_show_reconstruction(image_models, tmp_path, capsys):
    file = tmp_path / "new" / "plot.png"
    images = (image_models / "0.png", f"{image_models / 'rows'}:test:1")
    heights = []
    for count in (1, 2):
        options = ("--mask_ratio", "0.5", "--seed", "3", "--output", file)
        hf_tfm("show", "reconstruction", image_models / "mae", *images[:count], *options)
        ((height, *_),) = plots(capsys)
        heights.append(height)
    assert heights[1] > 1.5 * heights[0]


def test_show_positions(image_models, tmp_path, capsys):
    for name in ("vit", "mae"):
        hf_tfm("show", "positions", image_models / name, "--output", tmp_path / f"{name}.png")
    assert len(plots(capsys)) == 2


def test_show_positions_of_texts(model, tmp_path, capsys):
    other = save_model(tmp_path / "floater", position_embedding_type="floater")
    heights = []
    for models in ([model], [model, other]):
        hf_tfm("show", "positions", *models, "--length", "9", "--output", tmp_path / "positions.png")
        ((height, *_),) = plots(capsys)
        heights.append(height)
    assert heights[1] > 1.8 * heights[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("attention {0}/vit", "an image model needs an IMAGE, a text model a --text: give one of them"),
        ("attention {0}/vit {0}/0.png --text a", "give one of them"),
        ("attention {0}/vit {0}/0.png --target a", 'target applies to a text, but an image was given; got "a"'),
        ("attention {1} --text a --query mean", 'query applies to an image, but a text was given; got "mean"'),
        ("attention {1} {0}/0.png", "is a tfm_transformer model: pictures of images are for models of image patches"),
        ("attention {0}/vit --text a", "is a tfm_vit model, but a text needs a text model"),
        ("attention {0}/vit {0}/2.png", '2.png": it must be a file, or a row of a data set, dataset:split:index'),
        ("attention {0}/vit {0}/rows:test:2", 'index must be from 0 to 1 for split "test"'),
        ("attention {0}/vit {0}/0.png --query cls", 'query must be class or mean, got "cls"'),
        ("attention {0}/vit {0}/0.png --layers [2]", "layers must be one or more of 0 to 1, got [2]"),
        ("reconstruction {0}/vit {0}/0.png", "is a tfm_vit model: reconstructions are for masked autoencoders"),
        ("reconstruction {0}/mae {0}/0.png --mask_ratio 1", "mask_ratio must be in [0, 1), got 1"),
        ("reconstruction {0}/mae {0}/0.png --output {0}/picture.txt", 'output must be a ".png" file'),
        ("positions {0}/vit --output {0}/picture.txt", 'output must be a ".png" file'),
        ("positions {1} {0}/vit", "models must be one image model or several text models, got"),
        ("positions {1} --length 1", "length must be at least 2, got 1"),
        ("positions {0}/vit --output {0}", 'output must be a ".png" file'),
        ("attention {0}/vit {0}/0.png --output_dir {0}/0.png", "is a file: give the name of a folder"),
        ("attention {0}/vit {0}/0.png --heads [-3]", "heads must be one or more of 0 to 1, got [-3]"),
        ("queries {0}/vit --dataset_name digits --max_samples 0", "max_samples must be at least 1, got 0"),
    ],
)
def test_show_errors(words, named, image_models, model, refused):
    message = refused("show", *words.format(image_models, model).split())
    assert message.startswith(f"hf-tfm show {words.split()[0]}: ")
    assert named in message


def test_show_attention_refuses_a_text_too_long_for_a_plot(model, refused):
    message = refused("show", "attention", model, "--text", " ".join(["one"] * 3000))
    assert re.fullmatch(r"hf-tfm show attention: text must have at most 638 tokens, .*, got \d+", message)
    message = refused("show", "attention", model, "--text", "one", "--target", " ".join(["eins"] * 3000))
    assert message.startswith("hf-tfm show attention: target must have at most 638 tokens")


def test_show_refuses_a_too_large_image(image_models, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "MAX_PIXELS", 399)
    message = refused("show", "attention", image_models / "vit", image_models / "0.png")
    assert message.endswith("pixels, more than the limit of 399")


def test_show_requires_the_image_processor(image_models, tmp_path, refused):
    shutil.copytree(image_models / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    assert "has no image processor" in refused("show", "attention", tmp_path / "vit", image_models / "0.png")


@pytest.mark.parametrize(("to", "norm_first"), [("marian", False), ("pegasus", True)])
def test_convert_and_back(to, norm_first, tmp_path, capsys):
    model = save_model(tmp_path / "model", norm_first=norm_first)
    hf_tfm("convert", model, "--to", to, "--output_dir", tmp_path / to)
    assert "largest difference of logits" in capsys.readouterr().out
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / to).config.model_type == to
    hf_tfm("convert", tmp_path / to, "--to", "tfm", "--output_dir", tmp_path / "back")
    one, two = (AutoModelForSeq2SeqLM.from_pretrained(path).state_dict() for path in (model, tmp_path / "back"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_convert_and_push_errors(model, tmp_path, refused):
    assert "bert" in refused("convert", model, "--to", "bert", "--output_dir", tmp_path / "x")
    assert "does not exist" in refused("push", tmp_path / "nothing", "user/name")
    assert "is not a saved model" in refused("push", tmp_path, "user/name")


def test_run_lists_recipes(refused, capsys):
    assert "translation_train" in refused("run", status=2)
    with pytest.raises(SystemExit) as ended:
        hf_tfm("run", "--help")
    assert ended.value.code == 0
    assert "translation_train" in capsys.readouterr().out
    message = refused("run", "fly", status=2)
    assert (
        'there is no recipe "fly"; available: augment_texts, compress_distill, compress_train, detection_train'
        in message
    )


def test_run_passes_arguments_on(capsys):
    with pytest.raises(SystemExit) as ended:
        hf_tfm("run", "translation_train", "--config", "quickstart", "--seed", "5", "--print_config")
    assert ended.value.code == 0
    assert "\nseed: 5\n" in capsys.readouterr().out


def test_debug_keeps_the_traceback_of_an_unexpected_error(model, data, monkeypatch, refused):
    def broken(*args, **kwargs):
        raise TypeError("a fault")

    monkeypatch.setattr("hf_tfm.tasks.translation.translate", broken)
    assert "unexpected TypeError: a fault" in refused("evaluate", model, "--dataset_name", data)
    with pytest.raises(TypeError, match="a fault"):
        hf_tfm("evaluate", model, "--dataset_name", data, "--debug")


def run_in_fork(command, **_) -> subprocess.CompletedProcess:
    """Like `subprocess.run`, but the process starts with transformers imported."""
    process = processes.start(*command[1:], server="libraries", merge=False)
    status = process.wait(200)
    return subprocess.CompletedProcess(command, status, process.stdout.read_text(), process.stderr.read_text())


def test_quickstart(tmp_path, monkeypatch, capfd):
    """All its steps, with smaller models trained for two steps."""
    tiny = "{hidden_size: 16, num_attention_heads: 2, num_encoder_layers: 1, num_decoder_layers: 1}"
    text = [
        "--warmup_steps",
        "1",
        "--model",
        tiny,
        "--batch_tokens",
        "4096",
        "--max_length",
        "30",
        "--test_splits",
        "[validation]",
    ]
    schedule = ["--num_train_epochs", "null", "--warmup_epochs", "null"]
    encoder = "patch_size: 8, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2"
    decoder = "decoder_hidden_size: 16, decoder_intermediate_size: 32, decoder_num_hidden_layers: 1"
    images = [*schedule, "--model", f"{{{encoder}}}"]
    patches = [*schedule, "--model", f"{{{encoder}, {decoder}, decoder_num_attention_heads: 2}}"]
    detection = ["--model", "{d_model: 16, encoder_layers: 1, decoder_layers: 1}", "--warmup_steps", "1"]
    short = ["--num_train_epochs", "null"]
    short_options = {
        "translation_train": text,
        "mae_pretrain": patches,
        "detection_train": detection,
        "text_classification_train": short,
        "distill_task": short,
    }

    def short_run(recipe, argv):
        small = short_options.get(recipe, images)
        cli.run(recipe, [*argv, *small, "--max_steps", "2", "--mixed_precision", "no", "--progress", "false"])

    monkeypatch.setattr(quickstart, "run", short_run)
    # All scenes are drawn, although the detector trains on sixteen.
    monkeypatch.setitem(DIGIT_SCENES, "digit-scenes", 32)
    monkeypatch.setattr("hf_tfm.data.digit_scenes.digit_scenes", partial(digit_scenes, validation=2, test=2))
    hf_tfm("quickstart", "--output_dir", tmp_path / "quickstart")
    printed = capfd.readouterr().out
    assert "loaded in a new process" in printed
    for sentence in quickstart.SENTENCES:
        assert f"  {sentence} -> " in printed
    for row in (
        "translation ",
        "masked autoencoder",
        "fine-tuned from it",
        "from scratch",
        "detector",
        "teacher",
        "its student",
    ):
        assert f"  {row}" in printed
    folder = tmp_path / "quickstart"
    for file in ("cross_attention.png", "results.json", "README.md", "model.safetensors", "tokenizer.json"):
        assert (folder / file).is_file()
    for file in ("mae/reconstruction.png", "finetuned/attention/rollout.png", "scratch/results.json"):
        assert (tmp_path / f"quickstart-{file}").is_file()
    assert (tmp_path / "quickstart-text-student" / "attention.png").is_file()
    assert (tmp_path / "quickstart-detection" / "predictions" / "step-00000002.png").is_file()
    names = {row["name"] for row in json.loads((folder / "results.json").read_text())["metrics"]}
    assert names == {"exact_match", "chrf"}
    AutoTokenizer.from_pretrained(folder)
    (folder / "modeling_transformer.py").write_text("raise ImportError('broken')")
    monkeypatch.setattr("hf_tfm.quickstart.subprocess.run", run_in_fork)
    with pytest.raises(RuntimeError, match="does not load in a fresh process"):
        quickstart.translate_in_fresh_process(folder, ["one"])


@pytest.mark.parametrize("command", [("evaluate",), ("show", "positions"), ("show", "detections")])
def test_missing_model_is_named(command, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = {"evaluate": ["--dataset_name", "digits"], "detections": ["photo.png"]}.get(command[-1], [])
    assert f'model "{tmp_path}/none" is neither a local folder nor' in refused(*command, tmp_path / "none", *more)


def test_help_of_a_recipe_groups_options_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        hf_tfm("run", "text_classification_train", "--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    titles = [line for line in lines if line and line == line.lstrip() and line.endswith(":")]
    assert titles[0] == "options:" and titles[-1] == "Training:" and "The data set:" in titles
    text = " ".join(" ".join(lines).split())
    assert "--vocab_size INT vocabulary size of the trained tokenizer. (default: 30522)" in text
    assert "a preset: glue_base, glue_minilm, gpt1, quickstart, sst2_small" in text
    assert "--text_columns+" not in text and "null" not in text.replace("to be null", "")
    start = lines.index("The data set:")
    assert lines[start + 1].startswith("  --dataset_name STR")
    assert text.count("(required)") == 2
