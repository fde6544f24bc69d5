"""What MkDocs does to a page: pictures from the page's own code, and formulas without scripts.

A block of Python that is marked `{.picture alt="..."}` ends with a figure. The page's blocks are
run in order, as the tests run them, and the figure stands below its block, once for each palette.
Formulas become MathML, which browsers draw themselves; so nothing is loaded from elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"^```python[ \t]*(?P<mark>\{[^\n]*\})?[ \t]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
PICTURE = re.compile(r'\{\.picture alt="(?P<alt>[^"]+)"\}')
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
INKS = {"light": "#222222", "dark": "#e0e0e0"}


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Take the marks off blocks of code, and put a picture below each that makes one."""
    del files
    if not PICTURE.search(markdown):
        return BLOCK.sub(lambda block: f"```python\n{block['code']}```", markdown)
    name = Path(page.file.src_uri).stem
    folder = Path(config["site_dir"]) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    root = "../" * page.url.count("/") + "pictures"
    namespace: dict[str, Any] = {"__name__": f"docs_{name}"}
    count = 0

    def replaced(block: re.Match[str]) -> str:
        nonlocal count
        code, mark = block["code"], block["mark"] or ""
        text = f"```python\n{code}```"
        picture = PICTURE.fullmatch(mark)
        if mark and picture is None:
            return text
        with _elsewhere():
            exec(compile(code, page.file.src_uri, "exec"), namespace)
        if picture is None:
            return text
        count += 1
        for palette, ink in INKS.items():
            _save(folder / f"{name}-{count}-{palette}.svg", ink)
        _close()
        images = (
            f'<img alt="{picture["alt"]}" src="{root}/{name}-{count}-{palette}.svg#only-{palette}">'
            for palette in INKS
        )
        return "\n\n".join((text, "\n".join(images)))

    return BLOCK.sub(replaced, markdown)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Turn formulas into MathML."""
    del page, config, files
    from html import unescape

    from latex2mathml.converter import convert

    def replaced(formula: re.Match[str]) -> str:
        display = "inline" if formula["kind"] == "(" else "block"
        return str(convert(unescape(formula["tex"]), display=display))

    return FORMULA.sub(replaced, html)


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """A folder of its own for what the code of a page writes; what it prints is dropped."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            os.chdir(before)


def _save(path: Path, ink: str) -> None:
    """Write the current figure with lines and letters of one color, on nothing."""
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    figure = pyplot.gcf()
    for text in figure.findobj(Text):
        text.set_color(ink)
    for axes in figure.findobj(Axes):
        axes.tick_params(which="both", color=ink, labelcolor=ink)
        axes.patch.set_alpha(0)
        for spine in axes.spines.values():
            spine.set_color(ink)
        if (legend := axes.get_legend()) is not None:
            legend.get_frame().set_alpha(0)
    figure.savefig(path, transparent=True, bbox_inches="tight")


def _close() -> None:
    from matplotlib import pyplot

    pyplot.close("all")
