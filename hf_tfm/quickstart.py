"""Quickstart: train small models on data that needs no download, reload, compare and visualise them."""

import json
import subprocess
import sys
import time
from pathlib import Path

from .hub.loading import load_image_processor
from .recipe_files import run
from .tasks.translation import load_seq2seq
from .viz.attention import attention_maps, plot_alignment
from .viz.image_maps import image_attention_maps, plot_image_attention
from .viz.images import load_autoencoder, load_encoder, read_image
from .viz.reconstruction import plot_reconstructions, reconstruct_images
from .viz.text_attention import load_text_model, plot_beside, text_attention_maps

SENTENCES = ["twenty-one", "nine hundred and eighty-four", "seventy-three thousand, five hundred and sixty-two"]

NUMBER = "three hundred and forty-two"

DIGITS = [f"digits:test:{row}" for row in range(4)]

# Code that a user without this package would run: Auto classes and nothing of ours.
FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
folder, sentences = sys.argv[1], sys.argv[2:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
outputs = model.generate(**tokenizer(sentences, padding=True, return_tensors="pt"))
print(json.dumps([type(model).__module__, tokenizer.batch_decode(outputs, skip_special_tokens=True)]))
"""


def translate_in_fresh_process(folder: Path, sentences: list[str]) -> list[str]:
    """Translate with the saved model in a new Python process that imports only transformers.

    Raises:
        RuntimeError: the process failed, or it used this package's classes instead of the saved code.
    """
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder), *sentences]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the saved model in {folder} does not load in a fresh process: {reason}")
    module, translations = json.loads(done.stdout.splitlines()[-1])
    if not module.startswith("transformers_modules."):
        raise RuntimeError(f"the fresh process took its class from {module}, not from the code saved in {folder}")
    return translations


def train(recipe: str, folder: Path, *options: str) -> dict[str, float]:
    """Run a recipe's quickstart preset; return {"split metric": value}."""
    try:
        run(recipe, ["--config", "quickstart", "--output_dir", str(folder), *options])
    except SystemExit as end:
        # A recipe exits with its status; a run stopped by SIGTERM has no model yet.
        if end.code or not (folder / "results.json").is_file():
            raise
    rows = json.loads((folder / "results.json").read_text())["metrics"]
    return {f"{row['split']} {row['name']}": row["value"] for row in rows}


def quickstart(output_dir: str) -> None:
    """Train a translation model, image classifiers with and without pretraining, a detector, and a text classifier
    with a distilled student; reload, translate, plot.

    Args:
        output_dir: folder of the translation run; the other runs append a suffix to its name.
    """
    folder = Path(output_dir)
    if not folder.name or folder.is_file():
        raise ValueError(f'output_dir must be the name of a folder, got "{output_dir}"')
    start = time.perf_counter()
    found = {"translation": train("translation_train", folder)}
    print("\nloaded in a new process, with AutoModelForSeq2SeqLM and the code saved with the weights:")
    for sentence, translation in zip(SENTENCES, translate_in_fresh_process(folder, SENTENCES), strict=True):
        print(f"  {sentence} -> {translation}")
    model, tokenizer = load_seq2seq(output_dir)
    pictures = [plot_alignment(attention_maps(model, tokenizer, SENTENCES[-1]), folder / "cross_attention.png")]
    print(f"cross-attention: {pictures[0]}\nfirst result after {time.perf_counter() - start:.0f} s")

    ends = ("mae", "finetuned", "scratch", "detection", "text", "text-student")
    mae, tuned, scratch, detector, teacher, student = (folder.with_name(f"{folder.name}-{end}") for end in ends)
    print("\na masked autoencoder on handwritten digits, fine-tuned, and the same classifier from scratch:")
    found["masked autoencoder"] = train("mae_pretrain", mae)
    found["fine-tuned from it"] = train("image_classification_train", tuned, "--model_name_or_path", str(mae))
    found["from scratch"] = train("image_classification_train", scratch)
    digits = [read_image(image) for image in DIGITS]
    autoencoder = load_autoencoder(str(mae))
    rebuilt = reconstruct_images(autoencoder, load_image_processor(str(mae)), digits)
    pictures.append(plot_reconstructions(autoencoder, rebuilt, mae / "reconstruction.png"))
    maps = image_attention_maps(load_encoder(str(tuned)), load_image_processor(str(tuned)), digits[0])
    pictures += plot_image_attention(maps, tuned / "attention")

    print("\na detector overfits sixteen scenes of digits:")
    found["detector"] = train("detection_train", detector)
    pictures.append(max((detector / "predictions").glob("step-*.png")))

    print("\na text classifier is distilled into a student a fifth of its size:")
    found["teacher"] = train("text_classification_train", teacher)
    found["its student"] = train("distill_task", student, "--teacher", str(teacher))
    maps = [text_attention_maps(*load_text_model(str(model)), NUMBER) for model in (teacher, student)]
    pictures.append(plot_beside(*maps, student / "attention.png"))

    print()
    width = max(len(name) for name in found)
    for name, scores in found.items():
        shown = ", ".join(f"{score} {value:.4g}" for score, value in scores.items())
        print(f"  {name:<{width}}  {shown}")
    for title, paths in (
        ("figures", [f / "results.json" for f in (folder, mae, tuned, scratch, detector, teacher, student)]),
        ("pictures", pictures),
    ):
        print(f"{title}: {', '.join(str(path) for path in paths)}")
    print(f"card: {folder / 'README.md'}\ndone in {time.perf_counter() - start:.0f} s")
