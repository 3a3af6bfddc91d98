"""Upload the model in a run's folder to the Hub, with its tokenizer, code, card and results.

folder -> files that a run, `convert` or `save_pretrained` writes -> one commit; all other files are left out
"""

import glob
import re
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from ..families import FAMILIES
from .loading import read_json
from .saved_files import CARD, CODE_FIELDS, EVAL_RESULTS, INDEX, UPLOADED, inside

MODEL_ID_LINE = re.compile(r'^model_id = ".*"$', re.MULTILINE)
SHOWN = re.compile(r"!\[[^\]]*\]\(([\w.-]+\.(?:png|jpe?g|gif|svg|webp))\)")  # an image in the card's folder
SIBLING = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Upload the files of ``folder`` selected by `files_to_push` in one commit; create the repository if necessary.

    The usage example of README.md is changed to load ``repo_id``.

    Args:
        folder: a saved model, for instance a run's output folder.
        repo_id: "user/name" on the Hub.
        private: create a new repository as private; an existing one is not changed.
        commit_message: by default "Upload <folder name>".
        token: by default the token of `hf auth login` or HF_TOKEN.

    Returns:
        The result of `HfApi.upload_folder`; its ``commit_url`` shows the commit.

    Raises:
        ValueError: ``folder`` is not a complete saved model, or ``repo_id`` is not a valid repository name.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'repo_id must be the name of a repository, "user/name", got "{repo_id}"') from error
    names, _ = files_to_push(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if CARD in names:
        write_model_id(folder / CARD, repo_id)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or f"Upload {folder.resolve().name}",
        allow_patterns=[glob.escape(name) for name in names],
    )


def write_model_id(card: Path, repo_id: str) -> None:
    """Change the card's usage example to load ``repo_id``; the file is replaced atomically."""
    text = card.read_bytes().decode("utf-8")
    changed = MODEL_ID_LINE.sub(lambda _: f'model_id = "{repo_id}"', text)
    if changed != text:
        part = card.with_name(f"{CARD}.part")
        part.write_bytes(changed.encode("utf-8"))
        part.replace(card)


def files_to_push(folder: Path) -> tuple[list[str], list[str]]:
    """Split the files of a saved model into those to upload and those to leave out.

    Files written by a run, `convert` or ``save_pretrained`` are uploaded: the model, its tokenizer or image processor,
    the code named in config.json with its local imports, card, results, certificate, curve, images shown in the card,
    and ``.eval_results``. Everything else is left out: checkpoints and logs, run.json, the user's own files, and links
    to outside of the folder.

    Args:
        folder: a saved model.

    Returns:
        Sorted paths relative to ``folder``: files to upload; and files and folders left out.

    Raises:
        ValueError: ``folder`` is not a complete saved model; the message says what is missing.
    """
    check_model_folder(folder)
    patterns = [*UPLOADED, *(glob.escape(name) for name in code_files(folder) | pictures(folder))]
    results = folder / EVAL_RESULTS
    entries = [path for path in folder.iterdir() if path != results]
    if results.is_dir() and inside(results, folder):
        entries += results.iterdir()
    names: list[str] = []
    left_out: list[str] = []
    for path in sorted(entries):
        kept = fnmatchcase(path.name, "*.yaml") if path.parent == results else matches(path.name, patterns)
        own = path.is_file() and inside(path, folder)
        (names if kept and own else left_out).append(path.relative_to(folder).as_posix())
    return names, left_out


def matches(name: str, patterns: list[str]) -> bool:
    """Return True if a file name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def pictures(folder: Path) -> set[str]:
    """Return the names of the images in the folder that the card shows."""
    card = folder / CARD
    return set(SHOWN.findall(card.read_text(encoding="utf-8", errors="replace"))) if card.is_file() else set()


def code_files(folder: Path) -> set[str]:
    """Return the names of the Python files named in config.json, and of the local modules that they import.

    Raises:
        ValueError: config.json names code for a model type of transformers.
    """
    config = read_json(folder / "config.json")
    ours = config.get("model_type") in {family.config.model_type for family in FAMILIES}
    if not config.get(CODE_FIELDS[0]):
        return set()
    if config.get("model_type") in CONFIG_MAPPING and not ours:
        raise ValueError(
            f"config.json of folder {folder} names code ({CODE_FIELDS[0]}) for transformers' own model type "
            f'"{config["model_type"]}": remove that field'
        )
    paths = [place for place in config[CODE_FIELDS[0]].values() if isinstance(place, str) and "--" not in place]
    todo, found = {place.split(".")[0] for place in paths}, set()
    while todo:
        file = folder / f"{(module := todo.pop())}.py"
        if module.isidentifier() and file.name not in found and file.is_file():
            found.add(file.name)
            todo |= set(SIBLING.findall(file.read_text(encoding="utf-8")))
    return found


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that does not hold a complete model.

    Raises:
        ValueError: says what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder {folder} is not a saved model: it has no config.json")
    if not isinstance(read_json(folder / "config.json"), dict):
        raise ValueError(f"folder {folder} is not a saved model: its config.json holds no fields")
    weights = {path.name for path in folder.glob("*.safetensors")}
    if not weights:
        raise ValueError(f"folder {folder} is not a saved model: it has no weights (*.safetensors)")
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"folder {folder} is not a complete model: {INDEX} has no weight_map")
        shards = set(index["weight_map"].values())
        if missing := sorted(shards - weights):
            raise ValueError(
                f"folder {folder} is not a complete model: {INDEX} names {missing[0]}, which does not exist"
            )
    for name in sorted(weights):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"folder {folder} is not a complete model: {name} is damaged ({error})") from error
