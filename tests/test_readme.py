"""The README's tables say what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = re.findall(r"\| `([\w/.]+)`: `(\w+)` \|", README)


def test_the_table_is_read():
    assert len(PLACES) > 20


@pytest.mark.parametrize(("file", "symbol"), PLACES)
def test_where_is(file: str, symbol: str):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^(class|def|async def) {symbol}\b|^{symbol}\b.*=", source, re.MULTILINE), (
        f"{symbol} is not in {file}"
    )


def test_presets_are_listed():
    for recipe in (ROOT / "recipes").glob("*.py"):
        if recipe.stem in ("distill_cache", "augment_texts"):  # they train nothing of their own
            continue
        row = re.search(rf"\| `{recipe.stem}` \| (.*) \|", README)
        presets = sorted(p.stem for p in (ROOT / "recipes/presets" / recipe.stem).glob("*.yaml"))
        assert row and sorted(re.findall(r"`(\w+)`", row[1])) == presets
