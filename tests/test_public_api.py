"""The public names and how they are called are those in `public_api.txt`.

A change of a line there is a change for users: it needs a line in CHANGELOG.md, and where a name
goes or a call no longer works, what CONTRIBUTING.md says of public names. Write the file again by

    python tests/test_public_api.py
"""

from __future__ import annotations

import difflib
import enum
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pysciml_node as psn

FILE = Path(__file__).with_name("public_api.txt")
PACKAGE = "pysciml_node"
# Beside what `__all__` of the package names.
MODULES = ("compat.torchdiffeq", "compat.torchsde", "data", "flows", "layers")


def modules() -> Iterator[ModuleType]:
    yield psn
    named = [name for name in psn.__all__ if isinstance(getattr(psn, name), ModuleType)]
    for name in sorted({*named, *MODULES}):
        yield importlib.import_module(f"{PACKAGE}.{name}")


def names(module: ModuleType) -> list[str]:
    """Those that a module says are its own, and else those that are defined in it."""
    found = getattr(module, "__all__", None)
    if found is None:
        found = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
    return sorted(found)


def shown(default: Any) -> str:
    """A default, without what differs from one process or version to the next."""
    if inspect.isroutine(default) or inspect.isclass(default):
        return str(default.__name__)
    text = repr(default)
    return text if " at 0x" not in text else type(default).__name__


def call(f: Callable[..., Any]) -> str:
    """The arguments of a callable, without annotations."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        return "(...)"
    text, stars = [], False
    for p in signature.parameters.values():
        name = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if p.kind is p.KEYWORD_ONLY and not stars:
            text.append("*")
        stars = stars or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        text.append(name if p.default is p.empty else f"{name}={shown(p.default)}")
    return f"({', '.join(text)})"


def members(cls: type) -> Iterator[str]:
    """The public methods and attributes that a class of this package adds to others' bases."""
    for name in sorted(dir(cls)):
        if name.startswith("_") and name != "__call__":
            continue
        owner = next((base for base in cls.__mro__ if name in vars(base)), type)
        if not owner.__module__.startswith(f"{PACKAGE}."):
            continue
        value = inspect.getattr_static(cls, name)
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        yield name + (call(value) if inspect.isfunction(value) else "")


def listing() -> str:
    lines = []
    for module in modules():
        for name in names(module):
            value = getattr(module, name)
            full = f"{module.__name__}.{name}"
            if isinstance(value, ModuleType):
                continue
            own = getattr(value, "__module__", "").startswith(PACKAGE)
            if not own or not callable(value) or isinstance(value, enum.EnumMeta):
                lines += [
                    full,
                    *(f"{full}.{member}" for member in getattr(value, "__members__", ())),
                ]
                continue
            lines.append(full + call(value))
            if inspect.isclass(value):
                lines += [f"{full}.{member}" for member in members(value)]
    return "\n".join(sorted(set(lines))) + "\n"


def test_the_public_names_are_those_of_the_list() -> None:
    before = FILE.read_text(encoding="utf-8").splitlines()
    changes = list(difflib.unified_diff(before, listing().splitlines(), "list", "package", n=0))
    assert not changes, "\n".join([*changes, (__doc__ or "")])


def test_a_changed_call_is_seen() -> None:
    class Old:
        def solve(self, a: int, *, b: float = 1.0) -> None: ...

    class New:
        def solve(self, a: int, *, c: float = 1.0) -> None: ...

    assert call(Old.solve) == "(self, a, *, b=1.0)"
    assert call(Old.solve) != call(New.solve)


if __name__ == "__main__":
    FILE.write_text(listing(), encoding="utf-8")
