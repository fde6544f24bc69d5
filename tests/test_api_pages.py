"""The API pages of the site name everything that users import."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import pysciml_node

PAGES = Path(__file__).parents[1] / "docs" / "api"
PUBLIC = [
    "",
    ".budgets",
    ".compat",
    ".compat.torchdiffeq",
    ".compat.torchsde",
    ".data",
    ".flows",
    ".interpolate",
    ".kernels",
    ".layers",
    ".optim",
    ".plot",
    ".regularizers",
    ".tuning",
]


def resolve(name):
    """What a dotted name means, where a module and a function may share one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module of {name}")


@pytest.fixture(scope="module")
def documented():
    named = re.compile(r"^::: (\S+)", re.MULTILINE)
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    names = [name for name in named.findall(text) if name != "pysciml_node.lightning"]
    assert len(names) == len(set(names))  # one place a name
    return [resolve(name) for name in names]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_place(module, documented):
    public = importlib.import_module(f"pysciml_node{module}")
    values = {name: getattr(public, name) for name in public.__all__ if not name.startswith("_")}
    missing = [
        name
        for name, value in values.items()
        if not isinstance(value, ModuleType) and not any(value is entry for entry in documented)
    ]
    assert missing == []


def test_public_modules_have_a_place(documented):
    def named(module):
        inside = [vars(module).get(name) for name in getattr(module, "__all__", ())]
        return module in documented or any(
            value is entry for value in inside for entry in documented if value is not None
        )

    modules = [
        value
        for name in pysciml_node.__all__
        if isinstance(value := getattr(pysciml_node, name), ModuleType)
        and name not in ("compat", "init")  # their functions have places of their own
    ]
    assert modules
    assert [module.__name__ for module in modules if not named(module)] == []
