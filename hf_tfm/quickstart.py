"""The quickstart: train a small translation model on generated data, load it in a fresh process, look at it."""

import json
import subprocess
import sys
import time
from pathlib import Path

from .cli import run
from .evaluation import load_seq2seq
from .viz.attention import attention_maps, plot_alignment

SENTENCES = ["twenty-one", "nine hundred and eighty-four", "seventy-three thousand, five hundred and sixty-two"]

# What a user of the saved model types where this package is not installed: Auto classes and nothing of ours.
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
    """Translate with the saved model in a new Python process that imports transformers alone.

    Raises:
        RuntimeError: the process failed, or it used this package's classes instead of the saved code.
    """
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder), *sentences]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the saved model in {folder} does not load in a fresh process:\n{done.stderr}")
    module, translations = json.loads(done.stdout.splitlines()[-1])
    if not module.startswith("transformers_modules."):
        raise RuntimeError(f"the fresh process took its class from {module}, not from the code saved in {folder}")
    return translations


def quickstart(output_dir: str) -> None:
    """Train, evaluate and save; load again in a fresh process; translate; draw where the decoder looked."""
    folder = Path(output_dir)
    start = time.perf_counter()
    try:
        run("translation_train", ["--config", "quickstart", "--output_dir", output_dir])
    except SystemExit as end:
        # A recipe ends with its exit status; one that was asked to stop has no model to show yet.
        if end.code or not (folder / "results.json").is_file():
            raise
    print("\nloaded in a fresh process, with AutoModelForSeq2SeqLM and the code saved beside the weights:")
    for sentence, translation in zip(SENTENCES, translate_in_fresh_process(folder, SENTENCES), strict=True):
        print(f"  {sentence} -> {translation}")
    model, tokenizer = load_seq2seq(output_dir)
    picture = plot_alignment(attention_maps(model, tokenizer, SENTENCES[-1]), folder / "cross_attention.png")
    print(f"\nwhere the decoder looked: {picture}\nfigures: {folder / 'results.json'}\ncard: {folder / 'README.md'}")
    print(f"done in {time.perf_counter() - start:.0f} s")
