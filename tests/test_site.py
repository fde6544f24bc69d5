"""What the site makes of a page: outputs, pictures, a notebook, and a gallery of all pictures."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HOOKS = Path(__file__).parents[1] / "site" / "hooks.py"
PAGE = """# A title

Text with [a link](../regularizers.md).

```python
x = 2
print(x + 1)
```
```python {.no-run}
1 / 0
```
```python {.picture alt="A line that \\"rises\\""}
from matplotlib import pyplot as plt

plt.plot([0, x], "k--")
```

The end.
""".replace('\\"', "")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    hooks = runpy.run_path(str(HOOKS))
    page = SimpleNamespace(
        file=SimpleNamespace(src_uri="tutorials/lines.md"), url="tutorials/lines/", content=""
    )
    config = {"site_dir": str(tmp_path)}
    text = hooks["on_page_markdown"](PAGE, page=page, config=config, files=None)
    return SimpleNamespace(hooks=hooks, text=text, folder=tmp_path)


def test_a_page_shows_what_its_code_prints_and_draws(site):
    assert "```text\n3\n```" in site.text
    assert "1 / 0" in site.text
    assert "{." not in site.text  # no marks are left
    for palette in ("light", "dark"):
        assert (site.folder / "pictures" / f"lines-1-{palette}.svg").stat().st_size > 1000
        assert f'src="../../pictures/lines-1-{palette}.svg#only-{palette}"' in site.text


def test_black_lines_are_light_on_dark_pages(site):
    dark = (site.folder / "pictures" / "lines-1-dark.svg").read_text(encoding="utf-8")
    assert "stroke: #e0e0e0" in dark
    assert "stroke: #000000" not in dark


def test_a_tutorial_is_a_notebook_from_the_same_run(site):
    notebook = json.loads((site.folder / "tutorials" / "lines.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", "code", "markdown", "code", "markdown"]
    assert cells[0]["source"] == "# A title\n\nText with a link."
    assert cells[1]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "3\n"}]
    (shown,) = cells[3]["outputs"]
    assert shown["data"]["text/plain"] == "A line that rises"
    assert len({cell["id"] for cell in cells}) == len(cells)
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(cell["source"], namespace)  # the cells run in a place of their own
    assert 'href="../lines.ipynb"' in site.text


def test_the_gallery_shows_every_picture_and_leads_to_its_page(site):
    page = SimpleNamespace(url="gallery/", content=f"<p>{site.hooks['GALLERY']}</p>")
    site.hooks["on_page_context"]({}, page=page, config=None, nav=None)
    assert '<a href="../tutorials/lines/">' in page.content
    assert 'src="../pictures/lines-1-dark.svg#only-dark"' in page.content
    assert "<figcaption>A line that rises</figcaption>" in page.content


def test_formulas_become_markup_and_long_ones_are_scrolled(monkeypatch):
    stub = SimpleNamespace(convert=lambda tex, display: f"<math>{display} {tex}</math>")
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", stub)
    hooks = runpy.run_path(str(HOOKS))
    html = (
        '<p><span class="arithmatex">\\(a &lt; b\\)</span></p>'
        '<div class="arithmatex">\\[x^2\\]</div>'
    )
    made = hooks["on_page_content"](html, page=None, config=None, files=None)
    assert "<p><math>inline a < b</math></p>" in made
    assert '<div style="overflow-x: auto"><math>block x^2</math></div>' in made


def test_files_of_the_project_become_pages(site):
    page = SimpleNamespace(url="contributing/")
    text = "# Contributing\n\n<!-- the file CONTRIBUTING.md -->\n"
    made = site.hooks["on_page_markdown"](text, page=page, config=None, files=None)
    assert made.count("\n# ") == 0  # one title
    assert "](docs/" not in made
    assert "## Set up" in made


WITHOUT_PICTURES = {
    # Pages of commands, of Julia's side, and of what is drawn elsewhere.
    "changes.md",
    "citation.md",
    "contributing.md",
    "distributed.md",
    "engines.md",
    "gallery.md",
    "julia_fields.md",
    "julia_installation.md",
    "lightning.md",
}
PAGES = sorted((HOOKS.parents[1] / "docs").glob("*.md"))
TUTORIALS = sorted((HOOKS.parents[1] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS], ids=lambda page: page.name)
def test_pages_have_a_picture_of_their_own(page):
    found = "```python {.picture alt=" in page.read_text(encoding="utf-8")
    assert found or page.name in WITHOUT_PICTURES
