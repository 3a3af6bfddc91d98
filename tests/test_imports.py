"""Dependencies between folders of the package point one way, and modules have no import cycles.

The exceptions below remain from the earlier layout; the lists may only become shorter.
"""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hf_tfm"

# Pairs of folders that import each other.
MUTUAL: set[tuple[str, str]] = set()
# Modules in an import cycle, function-level imports included.
CIRCULAR: set[str] = set()


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, at the top or in a function."""
    file, found = FILES[name], set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            target = f"{base}.{node.module}" if node.module else base
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                found.add(inner if inner in FILES else target)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return {one for one in found if one in FILES and one != name}


GRAPH = {name: imports_of(name) for name in FILES}


def folder(name: str) -> str:
    """The folder of a module; a top-level module counts as its own folder."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def components() -> list[set[str]]:
    """Strongly connected sets of modules (Tarjan 1972)."""
    index, low, stack, on_stack, found = {}, {}, [], set(), []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        on_stack.add(name)
        for target in GRAPH[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in on_stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            component = set()
            while name not in component:
                component.add(member := stack.pop())
                on_stack.discard(member)
            found.append(component)

    for name in GRAPH:
        if name not in index:
            visit(name)
    return found


def test_no_two_folders_import_each_other():
    edges = defaultdict(set)
    for name, targets in GRAPH.items():
        edges[folder(name)] |= {folder(target) for target in targets} - {folder(name)}
    mutual = {tuple(sorted((a, b))) for a, targets in edges.items() for b in targets if a in edges[b]}
    assert mutual == MUTUAL


def test_modules_have_no_import_cycles():
    assert {name for component in components() if len(component) > 1 for name in component} == CIRCULAR


def test_models_import_nothing_else_of_the_package():
    assert {folder(target) for name, targets in GRAPH.items() if folder(name) == "models" for target in targets} == {
        "models"
    }
