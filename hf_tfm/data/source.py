"""Where a data set came from: the commit that was loaded, and the licence its card states."""

from pathlib import Path

from huggingface_hub import DatasetCard, HfApi, hf_hub_download

from .text import EMBEDDED

CARD = "README.md"


def describe_source(dataset: str, revision: str | None = None) -> dict[str, str | None]:
    """Commit and licence of a data set; None for what does not exist or, without a network, is not known.

    Args:
        dataset: as for `text.load_splits`.
        revision: commit, tag or branch on the Hub.

    Returns:
        ``revision``, the commit that ``revision`` or the newest version stands for, and ``license`` by its short name.
    """
    if dataset in EMBEDDED or Path(dataset).exists() or "/" not in dataset:  # generated, local, or a format's name
        card = Path(dataset) / CARD
        return {"revision": None, "license": licence(card) if card.is_file() else None}
    try:
        revision = HfApi().dataset_info(dataset, revision=revision).sha
        card = hf_hub_download(dataset, CARD, repo_type="dataset", revision=revision)
    except OSError:  # no network, or no card
        return {"revision": revision, "license": None}
    return {"revision": revision, "license": licence(Path(card))}


def licence(card: Path) -> str | None:
    """The licence in a card's metadata."""
    stated = DatasetCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    return ", ".join(stated) if isinstance(stated, list) else stated
