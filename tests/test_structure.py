"""Which room may import which: the map in CONTRIBUTING.md, checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pysciml_node"

# From the ground up: a room may import those that stand before it, and itself.
ROOMS = (
    "checks",
    "_optional",
    "plot",
    "problems",
    "tableaus",
    "algorithms",
    "solutions",
    "errors",
    "steps",
    "replay",
    "stochastic",
    "translation",
    "torch_engine",
    "julia_engine",
    "solving",
    "compat",
    "schedules",
    "interpolate",
    "budgets",
    "data",
    "regularizers",
    "layers",
    "monitoring",
    "lightning",
    "tuning",
    "flows",
    "kernels",
    "optim",
    "init",
    "cli",
    "experiments",
    "__main__",
)
ENGINES = ("torch_engine", "julia_engine")


def sources() -> list[Path]:
    """The package's Python files; pysciml_node/julia is a link to the Julia package."""
    return sorted(f for f in PACKAGE.rglob("*.py") if "julia" not in f.relative_to(PACKAGE).parts)


def imported(file: Path) -> Iterator[str]:
    """The modules of this package that a file imports, below the package's name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("pysciml_node."):
                yield name.removeprefix("pysciml_node.")


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


IMPORTS = [
    (room_of(file), name.partition(".")[0], file.relative_to(PACKAGE).as_posix())
    for file in sources()
    if room_of(file) != "__init__"
    for name in imported(file)
]


def test_every_room_is_on_the_map():
    assert {room_of(file) for file in sources()} - {"__init__"} == set(ROOMS)


def test_rooms_import_only_what_stands_below_them():
    """So there is no circle, and problems and tableaus know of no engine."""
    upward = [
        f"{file} imports {target}"
        for room, target, file in IMPORTS
        if ROOMS.index(target) > ROOMS.index(room)
    ]
    assert upward == []


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_imports_another(engine):
    others = set(ENGINES) - {engine}
    assert [file for room, target, file in IMPORTS if room == engine and target in others] == []


def test_files_import_in_one_direction():
    """No circle of files, not even one inside functions or hidden from the interpreter."""
    modules = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sources()
        if room_of(file) != "__init__"
    }
    following = {
        name: {
            target
            for full in imported(file)
            for target in (full, full.rpartition(".")[0])
            if target in modules and target != name and not name.startswith(f"{target}.")
        }
        for name, file in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(following[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def test_only_the_verb_and_the_commands_know_the_engines():
    """Everything else reads solutions."""
    knowing = {room for room, target, _ in IMPORTS if target in ENGINES and room != target}
    assert knowing <= {"solving", "cli", "__main__"}
