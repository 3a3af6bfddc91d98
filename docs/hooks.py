"""Hooks of mkdocs: pages and files outside docs/, and links to them.

Markdown pages link to files of the repository by relative paths, so that they also work where the repository is
browsed. Files that `ADDED` lists are part of the site; a link to any other file outside docs/ becomes plain text.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).parents[1]
ADDED = {  # pattern in the repository -> path in the site, or None for the same
    "model_cards/*.md": None,
    "model_cards/*.png": None,
    "model_cards/*.json": None,
    "model_cards/*/*.md": None,
    "model_cards/*/*.png": None,
    "model_cards/*/*.json": None,
    "benchmarks/README.md": None,
    "benchmarks/results/*.json": None,
    "recipes/presets/*/*.yaml": None,
    "recipes/launch/*": None,
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",  # of docs/
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")
TAG = re.compile(r"<([a-z_]\w*)>")  # without attributes
TAGS = re.compile(
    "a|autoref|b|blockquote|br|code|dd|details|div|dl|dt|em|h[1-6]|i|li|ol|p|pre|small|span|strong|summary|table|tbody|"
    "td|th|thead|tr|ul"
)
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def added() -> dict[str, str]:
    """Return {path in the repository: path in the site} of the files outside docs/."""
    found = {}
    for pattern, place in ADDED.items():
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            found[name] = place or name
    return found


def on_files(files, config):
    """Add the files outside docs/."""
    for name, place in added().items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links that lead out of docs/."""
    site = page.file.src_uri
    places = added()
    origins = {place: name for name, place in places.items() if place != "index.md"}
    origin = origins.get(site, f"docs/{site}")

    def rewritten(found: re.Match) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in target:
            return found[0]
        path = os.path.normpath(os.path.join(os.path.dirname(origin), target))
        if path.startswith("docs/"):
            place = path.removeprefix("docs/")
        elif path in places:
            place = places[path]
        elif not image and (ROOT / path).exists():
            return text
        else:
            return found[0]  # mkdocs reports it
        return f"{image}[{text}]({os.path.relpath(place, os.path.dirname(site) or '.')}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)


def on_page_content(html, page, config, files):
    """Warn about words in angle brackets, which a browser takes for tags and does not show."""
    for word in sorted(word for word in set(TAG.findall(html)) if not TAGS.fullmatch(word)):
        log.warning("%s: <%s> is taken for an HTML tag; write it as code", page.file.src_uri, word)
    return html
