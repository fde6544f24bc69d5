"""What MkDocs does to a page: its code is run, and formulas become markup without scripts.

The blocks of Python are run in order, as the tests run them. What a block prints stands below it.
One that is marked `{.picture alt="..."}` ends with a figure, which stands there too, once for each
palette. A tutorial is a notebook too, from the same run. The gallery shows all figures.
Formulas become MathML, which browsers draw themselves; so nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape, unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^```python[ \t]*(?P<mark>\{[^\n]*\})?[ \t]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
PICTURE = re.compile(r'\{\.picture alt="(?P<alt>[^"]+)"\}')
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\([^)]*\.md[^)]*\)")
INKS = {"light": "#222222", "dark": "#e0e0e0"}
GALLERY = "<!-- the pictures of all pages -->"
FILE = re.compile(r"<!-- the file (?P<path>[\w.]+) -->")


@dataclass
class Run:
    """The blocks of one page, run one after the other.

    Args:
        source: the page's file, for tracebacks.
        pictures: the folder of the figures.
    """

    source: str
    pictures: Path
    made: list[tuple[str, str]] = field(default_factory=list)  # name and alt text of each figure
    cells: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = Path(self.source).stem
        self.namespace: dict[str, Any] = {"__name__": f"docs_{self.name}"}
        self.folder = tempfile.TemporaryDirectory()  # for what the code of the page writes

    def text(self, markdown: str) -> str:
        """Text between blocks. A notebook has no other pages, so their links are taken off."""
        if stripped := LINK.sub(r"\1", markdown).strip():
            self.cells.append(_cell("markdown", stripped))
        return markdown

    def block(self, code: str, mark: str, root: str) -> str:
        """Run a block, and return it with what it prints and draws."""
        shown = f"```python\n{code}```"
        picture = PICTURE.fullmatch(mark)
        if mark and picture is None:
            self.cells.append(_cell("markdown", shown))
            return shown
        with _inside(self.folder.name) as printed:
            exec(compile(code, self.source, "exec"), self.namespace)
        outputs: list[dict[str, Any]] = []
        if text := printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": text})
            shown += f"\n\n```text\n{text.rstrip()}\n```"
        if picture is not None:
            outputs.append(_display(picture["alt"]))
            shown += f"\n\n{self._draw(picture['alt'], root)}"
        self.cells.append(_cell("code", code.rstrip(), outputs=outputs, execution_count=None))
        return shown

    def _draw(self, alt: str, root: str) -> str:
        """Save the current figure in both palettes."""
        name = f"{self.name}-{len(self.made) + 1}"
        self.made.append((name, alt))
        for palette, ink in INKS.items():
            _save(self.pictures / f"{name}-{palette}.svg", ink)
        _pyplot().close("all")
        return _images(name, alt, root)

    def notebook(self) -> str:
        """The page as a notebook of Jupyter, format 4.5."""
        for number, cell in enumerate(self.cells):
            cell["id"] = f"{self.name}-{number}"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = {
            "cells": self.cells,
            "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


RUNS: dict[str, Run] = {}  # by the address of the page


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Run the blocks of a page, and put what they print and draw below them."""
    del files
    if FILE.search(markdown):
        return FILE.sub(lambda found: _file(ROOT / found["path"]), markdown)
    if not BLOCK.search(markdown):
        return markdown
    site = Path(config["site_dir"])
    (site / "pictures").mkdir(parents=True, exist_ok=True)
    run = RUNS[page.url] = Run(page.file.src_uri, site / "pictures")
    root, end, shown = _root(page), 0, []
    for block in BLOCK.finditer(markdown):
        shown.append(run.text(markdown[end : block.start()]))
        shown.append(run.block(block["code"], block["mark"] or "", root))
        end = block.end()
    shown.append(run.text(markdown[end:]))
    if page.file.src_uri.startswith("tutorials/"):
        (site / "tutorials").mkdir(exist_ok=True)
        (site / "tutorials" / f"{run.name}.ipynb").write_text(run.notebook(), encoding="utf-8")
        link = f'<a class="md-button" href="../{run.name}.ipynb" download>Notebook</a>'
        title, rest = "".join(shown).split("\n", 1)
        return f"{title}\n\n{link}\n{rest}"
    return "".join(shown)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Turn formulas into MathML."""
    del page, config, files
    from latex2mathml.converter import convert

    def replaced(formula: re.Match[str]) -> str:
        tex = unescape(formula["tex"])
        if formula["kind"] == "(":
            return str(convert(tex, display="inline"))
        # A long one is scrolled, so that the page stays as wide as a telephone.
        return f'<div style="overflow-x: auto">{convert(tex, display="block")}</div>'

    return FORMULA.sub(replaced, html)


def on_page_context(context: Any, *, page: Any, config: Any, nav: Any) -> Any:
    """Fill the gallery, now that all pages have been run."""
    del config, nav
    if GALLERY in (page.content or ""):
        root = _root(page)
        figures = (
            f'<figure><a href="{root}{url}">{_images(name, alt, root)}</a>'
            f"<figcaption>{escape(alt)}</figcaption></figure>"
            for url, run in RUNS.items()
            for name, alt in run.made
        )
        page.content = page.content.replace(GALLERY, "\n".join(figures))
    return context


def _file(path: Path) -> str:
    """A file of the project as a part of a page: without its title, with links from there."""
    _, text = path.read_text(encoding="utf-8").split("\n", 1)
    text = BLOCK.sub(lambda block: f"```python\n{block['code']}```", text)
    return text.replace("](docs/", "](")


def _root(page: Any) -> str:
    """The way from a page to the site's root."""
    return "../" * page.url.count("/")


def _images(name: str, alt: str, root: str) -> str:
    return "\n".join(
        f'<img alt="{escape(alt)}" src="{root}pictures/{name}-{palette}.svg#only-{palette}">'
        for palette in INKS
    )


def _cell(kind: str, source: str, **more: Any) -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": source, **more}


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[io.StringIO]:
    """Work in a folder; gives what is printed there."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        yield printed


def _pyplot() -> Any:
    from matplotlib import pyplot

    return pyplot


def _display(alt: str) -> dict[str, Any]:
    """The current figure as the output of a notebook's cell."""
    image = io.BytesIO()
    _pyplot().gcf().savefig(image, format="png", dpi=70, bbox_inches="tight")
    data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": alt}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _save(path: Path, ink: str) -> None:
    """Write the current figure with letters and black lines of one color, on nothing."""
    from matplotlib.axes import Axes
    from matplotlib.colors import same_color
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    figure = _pyplot().gcf()
    for text in figure.findobj(Text):
        text.set_color(ink)
    for line in figure.findobj(Line2D):
        if same_color(line.get_color(), "black") or same_color(line.get_color(), INKS["light"]):
            line.set_color(ink)
    for axes in figure.findobj(Axes):
        axes.tick_params(which="both", color=ink, labelcolor=ink)
        axes.patch.set_alpha(0)
        for spine in axes.spines.values():
            spine.set_color(ink)
        if (legend := axes.get_legend()) is not None:
            legend.get_frame().set_alpha(0)
    figure.savefig(path, transparent=True, bbox_inches="tight")
