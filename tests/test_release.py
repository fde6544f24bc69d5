"""What a release is made from agrees with itself."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path

import pysciml_node

ROOT = Path(__file__).parents[1]
NAMES = (
    *("pyproject.toml", "pysciml_node/__init__.py", "CITATION.cff", "CHANGELOG.md"),
    "conda/recipe.yaml",
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def problems(version: str, root: Path) -> list[str]:
    path = ROOT / ".github" / "check_release.py"
    spec = importlib.util.spec_from_file_location("check_release", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.problems(version, root)
    return found


def test_all_places_name_one_version() -> None:
    """Only the list of changes may be missing: the version in work has no section of its own."""
    assert [p for p in problems(pysciml_node.__version__, ROOT) if "CHANGELOG" not in p] == []


def test_a_release_is_let_through_when_every_place_has_its_version(tmp_path: Path) -> None:
    for name in NAMES:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
        text = target.read_text(encoding="utf-8").replace(pysciml_node.__version__, "7.0.0")
        if name == "CHANGELOG.md":
            text = text.replace("## Unreleased", "## Unreleased\n\n## 7.0.0 - 2031-01-02", 1)
        target.write_text(text, encoding="utf-8")
    assert problems("7.0.0", tmp_path) == []
    assert len(problems("7.0.1", tmp_path)) == len(NAMES)


def test_the_recipe_asks_for_what_the_package_asks_for() -> None:
    """By the names that conda-forge has for them."""
    text = (ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8")
    names = {"torch": "pytorch", "juliacall": "pyjuliacall", "juliapkg": "pyjuliapkg"}
    for requirement in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"(\w+)(.*)", requirement).groups()  # type: ignore[union-attr]
        assert f"    - {names.get(name, name)} {bound}\n" in text


def test_the_summary_fits_a_line() -> None:
    assert len(PROJECT["description"]) <= 60
