"""Upload the model in a run's folder to the Hub, with its tokenizer, code, card and results."""

import glob
import json
import re
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .card import CARD, EVAL_RESULTS
from .results import RUN

INDEX = "model.safetensors.index.json"
MODEL_ID_LINE = re.compile(r'^model_id = ".*"$', re.MULTILINE)


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push the files of ``folder``, and ``.eval_results``, as one commit; the repository is made if need be.

    Other sub-folders (checkpoints, logs) stay here, and so does run.json, which knows paths of this machine. The usage
    example of README.md is changed to load ``repo_id``.

    Args:
        folder: a saved model, for instance a run's output folder.
        repo_id: "user/name" on the Hub.
        private: make a new repository private; one that exists stays as it is.
        commit_message: default, "Upload <folder's name>".
        token: default, the one of `hf auth login` or HF_TOKEN.

    Returns:
        What `HfApi.upload_folder` returns; ``commit_url`` is where to look.

    Raises:
        ValueError: ``folder`` is not a whole saved model.
    """
    folder = Path(folder)
    check_model_folder(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = folder / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(MODEL_ID_LINE.sub(f'model_id = "{repo_id}"', text), encoding="utf-8")
    # By name, so that neither a checkpoint nor a half-written file slips in.
    names = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".part" and path.name != RUN
    ]
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or f"Upload {folder.resolve().name}",
        allow_patterns=[*(glob.escape(name) for name in sorted(names)), f"{EVAL_RESULTS}/*"],
    )


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that does not hold a whole model.

    Raises:
        ValueError: it says what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder {folder} is not a saved model: it has no config.json")
    weights = {path.name for path in folder.glob("*.safetensors")}
    if not weights:
        raise ValueError(f"folder {folder} is not a saved model: it has no weights (*.safetensors)")
    if (folder / INDEX).is_file():
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shards - weights):
            raise ValueError(f"folder {folder} is not a whole model: {INDEX} names {missing[0]}, which is not there")
