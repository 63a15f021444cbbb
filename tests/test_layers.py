"""A module imports from layers above its own in this table and from its own package; never sideways or downward."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "quarterlight"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

LAYERS = (
    ("records", "errors", "prompts", "images", "manifest", "files"),
    ("losses", "metrics"),
    ("models", "data", "index"),
    ("training", "search"),
    ("mining", "evaluation", "serving"),
    ("recipe",),
    ("plan",),
    ("pipeline", "cli"),
)
"""Top-level modules and packages, from what knows nothing to what knows everything."""

LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
FREE = (
    "",
    "__main__",
    "registration",
    "cli",
)  # the first gathers public names; commands use what they want
PEERS = LAYERS[0]  # single files of nouns: these may use each other, as long as no cycle arises


def test_imports_point_upward() -> None:
    sentences = [sentence for edge in _edges(SOURCE, PACKAGE) if (sentence := _objection(*edge))]
    assert not sentences, "\n" + "\n".join(sentences)


def test_no_import_cycles() -> None:
    cycle = _cycle(_edges(SOURCE, PACKAGE))
    assert not cycle, f"These modules import each other: {' -> '.join(cycle)}. Move what they share to a layer above."


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("quarterlight.search.retrieve", "quarterlight.index.store", True),
        ("quarterlight.models.embedder", "quarterlight.models.pooling", True),
        ("quarterlight.records", "quarterlight.errors", True),
        ("quarterlight.models.embedder", "quarterlight.data.images", False),
        ("quarterlight.losses.contrastive", "quarterlight.training.contrast", False),
        ("quarterlight.index.store", "quarterlight", False),
        ("quarterlight.search.retrieve", "quarterlight.Item", False),
        ("quarterlight.newcomer", "quarterlight.errors", False),
        ("quarterlight.cli.index", "quarterlight.Embedder", True),
    ],
)
def test_rule_knows_right_from_wrong(importer: str, imported: str, allowed: bool) -> None:
    assert (_objection(importer, imported, 1) is None) is allowed


def test_walk_sees_every_form_of_import(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "embedder.py").write_text(
        "import quarterlight.records as r\n"
        "if TYPE_CHECKING:\n    from quarterlight import cli\n"
        "def f():\n    from ..training import contrast\n    from . import pooling\n"
    )
    found = {imported for _, imported, _ in _edges(tmp_path, PACKAGE)}
    assert found == {
        "quarterlight.records",
        "quarterlight.cli",
        "quarterlight.training.contrast",
        "quarterlight.models.pooling",
    }


def test_cycles_are_found() -> None:
    edges = [("a", "b", 1), ("b", "c", 1), ("c", "a", 1), ("c", "d", 1)]
    assert set(_cycle(edges)) == {"a", "b", "c"}
    assert not _cycle(edges[:2] + edges[3:])


def _objection(importer: str, imported: str, line: int) -> str | None:
    """Why this import is wrong, or None."""
    own, other = _part(importer), _part(imported)
    if own == other or own in FREE:
        return None
    where = f"{importer}, line {line}:"
    if own not in LAYER:
        return f"{where} {own!r} has no layer; give it a row in LAYERS of tests/test_layers.py."
    if other not in LAYER:
        return f"{where} {imported!r} is in no layer: import a name from where it is defined, or give the module a row."
    if LAYER[other] < LAYER[own] or (own in PEERS and other in PEERS):
        return None
    direction = "sideways" if LAYER[other] == LAYER[own] else "downward"
    return f"{where} layer {LAYER[own]} ({own}) imports {direction} from layer {LAYER[other]} ({imported})."


def _part(module: str) -> str:
    """The top-level part of a module name: ``quarterlight.models.pooling`` -> ``models``; "" for the package itself."""
    return [*module.split("."), ""][1]


def _edges(source: Path, package: str) -> list[tuple[str, str, int]]:
    """(importing module, imported module or name, line) for every import of the package by the package."""
    edges = []
    for path in sorted(source.rglob("*.py")):
        dotted = ".".join((package, *path.relative_to(source).with_suffix("").parts))
        module = dotted.removesuffix(".__init__")
        parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for imported, line in _imports(ast.parse(path.read_bytes(), str(path)), parent):
            if imported == package or imported.startswith(f"{package}."):
                edges.append((module, imported, line))
    return edges


def _imports(tree: ast.Module, parent: str) -> Iterator[tuple[str, int]]:
    """Everything imported anywhere in a file: at its top, inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def _cycle(edges: list[tuple[str, str, int]]) -> list[str]:
    """Some modules that import each other, in order; empty when there are none.  Names inside modules count as them."""
    modules = {importer for importer, _, _ in edges}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for importer, imported, _ in edges:
        target = imported if imported in modules else imported.rpartition(".")[0]
        if target in modules and target != importer:
            graph[importer].add(target)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(modules) if (found := visit(module, []))), [])
