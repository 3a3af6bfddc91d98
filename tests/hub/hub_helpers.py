"""Shared helpers of the Hub tests: tiny models, a tiny tokenizer, and fresh Python processes."""

import importlib.util
import json
import os
from pathlib import Path

import processes
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
TEXT = ["one two three four five", "eins zwei drei vier fünf", "twenty-one is einundzwanzig"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with about 300 tokens that appends </s> to each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    pad, bos, eos, unknown, mask = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown, mask_token=mask
    )


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0, std: float = 0.4) -> PreTrainedModel:
    """Draw every trained weight anew, also biases and layer norms, so that no two parameters are equal by default."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=std, generator=generator)
    return model.eval()


@torch.no_grad()
def outputs(repo: str) -> dict:
    """Outputs of the Auto classes for a repository or folder, as JSON that keeps the exact values."""
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    base = AutoModel.from_pretrained(repo, trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(repo, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    inputs = tokenizer(TEXT[:2], padding=True, return_tensors="pt", return_token_type_ids=False)
    # With one thread the order of summation is fixed.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "classes": [type(part).__name__ for part in (config, base, model)],
            "fast": tokenizer.is_fast,
            "input_ids": inputs["input_ids"].tolist(),
            "states": base(**inputs, decoder_input_ids=inputs["input_ids"]).last_hidden_state.tolist(),
            "logits": model(**inputs, decoder_input_ids=inputs["input_ids"]).logits.tolist(),
            "generated": model.generate(**inputs, max_new_tokens=8).tolist(),
        }
    finally:
        torch.set_num_threads(threads)


BLOCK_PACKAGE = '''
import sys

class Blocked:
    """Makes this process one where the package is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_tfm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
'''


# HF_HUB_OFFLINE=1 for a process that has already imported huggingface_hub.
OFFLINE = "import huggingface_hub.constants\nhuggingface_hub.constants.HF_HUB_OFFLINE = True\n"


def run_python(
    code: str, folder: Path, environment: dict[str, str] | None = None, without_package: bool = False
) -> dict:
    """Run ``code`` in a new process in ``folder``; it prints its result as JSON in the last line.

    Args:
        environment: variables that differ from this process's environment, among them those of the Hub; by default the
            process is offline.
        without_package: make every import of hf_tfm fail.
    """
    # The tested checkout, even if another version is installed.
    package = Path(importlib.util.find_spec("hf_tfm").origin).parents[1]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(processes.__file__).parent), str(package)])
    script = folder / ("clean.py" if without_package else "script.py")
    server, first = ("libraries", OFFLINE) if environment is None else ("torch", "")
    script.write_text((BLOCK_PACKAGE if without_package else "") + first + code, encoding="utf-8")
    inherited = os.environ if environment is None else processes.clean_environment()
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(environment or {})}
    process = processes.start(str(script), environment=environment, cwd=folder, server=server, merge=False)
    processes.finish(process, timeout=300)
    return json.loads(process.stdout.read_text().splitlines()[-1])
