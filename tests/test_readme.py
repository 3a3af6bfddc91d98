"""Tables in README.md and docs/ match the code and the results files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "docs/**/", "model_cards/", "benchmarks/")
PAGES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))
WHERE = (ROOT / "docs" / "where.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
PLACES = re.findall(r"\| `([\w/.]+)`: `(\w+)` \|", WHERE)


def test_code_table_is_found():
    assert len(PLACES) > 20


@pytest.mark.parametrize(("file", "symbol"), PLACES)
def test_code_table_entries_exist(file: str, symbol: str):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^(class|def|async def) {symbol}\b|^{symbol}\b.*=", source, re.MULTILINE), (
        f"{symbol} is not in {file}"
    )


def test_presets_are_listed():
    for recipe in (ROOT / "recipes").glob("*.py"):
        if recipe.stem in ("distill_cache", "augment_texts"):  # they train nothing themselves
            continue
        row = re.search(rf"\| `{recipe.stem}` \| (.*) \|", RECIPES)
        presets = sorted(p.stem for p in (ROOT / "recipes/presets" / recipe.stem).glob("*.yaml"))
        assert row and sorted(re.findall(r"`(\w+)`", row[1])) == presets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(page: Path):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
