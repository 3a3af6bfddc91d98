"""Names of the files that runs, conversions and ``save_pretrained`` write.

WRITTEN     by a run, as patterns relative to its folder: overwriting deletes these and nothing else
UPLOADED    by any of them, as patterns of names: a push uploads these, the code named in config.json, images shown in
            the card, and `EVAL_RESULTS`
"""

from pathlib import Path

from .. import models

RESULTS = "results.json"
HISTORY = "history.jsonl"
RUN = "run.json"  # marks a run's folder; written first and deleted last
CARD = "README.md"
CURVE = "training_curve.png"
PREDICTIONS, PICTURE = "predictions/step-*.png", "predictions.png"  # of every evaluation; the last one, for the card
EVAL_RESULTS = ".eval_results"
COMPRESSION, COMPRESSION_TEXT, PARETO = "compression.json", "compression.md", "pareto.png"  # written by compress
CERTIFICATE = "parity_certificate.json"  # written by conversions
PROJECTION = "projection.safetensors"  # written by a conversion from TinyBERT
INDEX = "model.safetensors.index.json"

CHECKPOINTS = "checkpoints"
MODEL_FILE, OPTIMIZER_FILE, EMA_FILE = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
TASK_FILE, STATE_FILE = "task.safetensors", "state.json"
CHECKPOINT_FILES = (MODEL_FILE, OPTIMIZER_FILE, EMA_FILE, TASK_FILE, STATE_FILE)
SHARDS = "shard-*.safetensors"  # of the processes of a sharded run, in the place of the first three
CHECKPOINT_STATES = ("", ".part-", ".old-", "damaged-")  # prefixes of checkpoint folders: complete, and others

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "target_vocab.json", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm"),
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Of sentence-transformers: its list of modules, and their settings. Each module after the encoder has a folder.
SENTENCE_MODULES = "modules.json"
SENTENCE_FILES = (SENTENCE_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
WEIGHTS = (MODEL_FILE, "model-?????-of-?????.safetensors", INDEX)
MODEL_FILES = ("config.json", "generation_config.json", *WEIGHTS, *TOKENIZER_FILES, *PROCESSOR_FILES)
CODE_FILES = tuple(sorted(path.name for path in Path(models.__file__).parent.glob("*.py")))  # saved as remote code
RECORD_FILES = (CARD, RESULTS, HISTORY, CURVE, PICTURE)

WRITTEN = (
    *(*MODEL_FILES, *CODE_FILES, *RECORD_FILES),
    *(f"{name}.part" for name in (RESULTS, HISTORY, RUN)),
    *(f"{CHECKPOINTS}/{state}step-*/{STATE_FILE}.part" for state in CHECKPOINT_STATES),
    *(PREDICTIONS, f"{EVAL_RESULTS}/*.yaml"),
    *(f"{folder}/{name}" for folder in ("tokenizer", "processor") for name in (*TOKENIZER_FILES, *PROCESSOR_FILES)),
    *(f".part-*/{name}" for name in (*MODEL_FILES, *CODE_FILES)),
    *(f"{CHECKPOINTS}/{state}step-*/{name}" for state in CHECKPOINT_STATES for name in (*CHECKPOINT_FILES, SHARDS)),
    *("hf-tfm/*tfevents*", "hf-tfm/*/hparams.yml", "hf-tfm/*/*tfevents*"),  # TensorBoard
)
UPLOADED = (*MODEL_FILES, *RECORD_FILES, COMPRESSION, COMPRESSION_TEXT, PARETO, CERTIFICATE, PROJECTION)

# Fields of JSON files by which transformers finds code that a folder brings.
CODE_FIELDS = ("auto_map", "custom_pipelines")


def inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, after all links."""
    return path.resolve().is_relative_to(folder.resolve())
