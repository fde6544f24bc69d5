"""The code of README.md, CONTRIBUTING.md, docs/ and docstrings, run as it is written."""

import doctest
import importlib.util
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest

import pysciml_node

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# What the site runs is what is tested.
BLOCK = runpy.run_path(str(ROOT / "site" / "hooks.py"))["BLOCK"]
MODULES = ["pysciml_node"] + [
    module.name
    for module in pkgutil.walk_packages(pysciml_node.__path__, "pysciml_node.")
    if not module.name.endswith("__main__")
]
# What nobody has to install.
WITH_LIGHTNING = importlib.util.find_spec("lightning") is not None
if not WITH_LIGHTNING:
    MODULES.remove("pysciml_node.lightning")


def blocks(text: str, *, julia: bool = False) -> list[tuple[int, str]]:
    """The Python blocks of a page that are to run, each with the number of its first line."""
    left_out = {"{.no-run}", "{.julia}", "{.lightning}"}
    left_out -= {"{.julia}"} if julia else set()
    left_out -= {"{.lightning}"} if WITH_LIGHTNING else set()
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in BLOCK.finditer(text)
        if match["mark"] not in left_out
    ]


@pytest.fixture(autouse=True)
def no_windows(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def run(page, found):
    namespace = {"__name__": f"docs_{page.stem}"}
    for line, code in found:
        # Blank lines in front give a traceback the page's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, blocks(page.read_text(encoding="utf-8")))


@pytest.mark.julia
@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python {.julia}\n" in page.read_text(encoding="utf-8")],
    ids=lambda page: page.name,
)
def test_code_for_julia_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, blocks(page.read_text(encoding="utf-8"), julia=True))


def test_marked_blocks_are_left_out():
    text = """a
```python {.no-run}
1 / 0
```
```python
x = 1
```
```python {.julia}
y
```
```python {.picture alt="a line"}
z
```
"""
    assert blocks(text) == [(6, "x = 1\n"), (12, "z\n")]
    assert blocks(text, julia=True) == [(6, "x = 1\n"), (9, "y\n"), (12, "z\n")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "examples" / "README.md"], ids=lambda page: page.name
)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_example_is_listed():
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    programs = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert programs == set(re.findall(r"\w+\.py", listed))
