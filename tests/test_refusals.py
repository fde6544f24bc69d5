"""Every refusal says what to do, on a second line that is indented by two spaces."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pysciml_node"
REMEDY = "\n  "

# Answers to Python's own protocols, which nobody reads as advice.
PROTOCOL = {"AttributeError", "IndexError", "KeyError", "NotImplementedError", "StopIteration"}
PROTOCOL |= {"SystemExit"}

# Raises without a remedy of their own, by file and function.
EXCEPTIONS = {
    # Assertions about calls of our own.
    "algorithms/controllers.py: rejected",
    "stochastic/ticks.py: split",
    "julia_engine/process/entries.py: _tensor",
    "julia_engine/process/entries.py: address",
    "julia_engine/process/entries.py: enter",
    # Reasons that a caller puts into a message with a remedy.
    "data/cifar10.py: find_class",
    "data/download.py: _chunks",
    "data/physionet.py: _check_archive",
    "data/physionet.py: _hours",
    "data/physionet.py: _number",
    "data/physionet.py: parse_record",
    # As `inspect.signature` raises, and caught like that.
    "checks/callables.py: _documented",
    # Messages that were made elsewhere: by an engine's `refusal`, by the search for Julia,
    # by the solve whose words are exchanged.
    "julia_engine/commands/install.py: record",
    "julia_engine/commands/install.py: run",
    "julia_engine/process/launch.py: prepare",
    "julia_engine/process/runtime.py: start",
    "compat/torchsde/words.py: in_torchsde_words",
    "solving/engines.py: _expect",
    # Julia's own exceptions.
    "julia_engine/process/runtime.py: call",
    "julia_engine/process/runtime.py: call_released",
}


def trees() -> Iterator[tuple[str, ast.Module]]:
    """The package's Python files; pysciml_node/julia is a link to the Julia package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE)
        if name.parts[0] != "julia":
            yield name.as_posix(), ast.parse(file.read_text(encoding="utf-8"))


FILES = dict(trees())


def calls(tree: ast.AST, place: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node below `tree`, with the function that it stands in."""
    for child in ast.iter_child_nodes(tree):
        inner = child.name if isinstance(child, ast.FunctionDef) else place
        yield inner, child
        yield from calls(child, inner)


def name_of(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def remedied(node: ast.AST, telling: set[str]) -> bool:
    """Whether an expression holds a second line, or something that brings one."""
    return any(
        (isinstance(part, ast.Constant) and isinstance(part.value, str) and REMEDY in part.value)
        or name_of(part) in telling
        for part in ast.walk(node)
    )


def telling_names() -> set[str]:
    """Constants and functions that make messages with a remedy, and errors that add one."""
    telling = {"UnsupportedModule", "failure_message"}
    for _ in range(2):  # a message may be made of another
        for tree in FILES.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    returned = [x for x in ast.walk(node) if isinstance(x, ast.Return) and x.value]
                    if returned and all(remedied(x, telling) for x in returned):
                        telling.add(node.name)
            for node in tree.body:
                if isinstance(node, ast.Assign) and remedied(node.value, set()):
                    telling |= {name_of(target) for target in node.targets}
    return telling


def test_every_raise_has_a_remedy() -> None:
    telling = telling_names()
    silent = {
        f"{file}: {place}"
        for file, tree in FILES.items()
        for place, node in calls(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and name_of(node.exc.func) not in PROTOCOL
        and not remedied(node.exc, telling)
    }
    assert silent - EXCEPTIONS == set(), "end the message with .\\n  What to do."
    assert EXCEPTIONS - silent == set(), "these have a remedy now: take them off the list"


def test_every_refused_argument_has_a_remedy() -> None:
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or name_of(node.func) != "refuse":
                continue
            if file.startswith("translation/"):
                continue  # the error that it makes adds the remedy
            hints = [*node.args[3:4], *(x.value for x in node.keywords if x.arg == "hint")]
            empty = any(isinstance(hint, ast.Constant) and not hint.value for hint in hints)
            assert hints, f"{file}:{node.lineno} gives no hint"
            assert not empty, f"{file}:{node.lineno} gives an empty hint"
