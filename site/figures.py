"""Tables of README and pages, written from runs that are stored beside this file.

A table stands between two comments, `<!-- run: NAME -->` and `<!-- end of run -->`. Its numbers are
in `site/stored/NAME.json`: the summary over seeds, the command, the date, machine and versions.

    python site/figures.py                          # write all tables (make figures)
    python site/figures.py --check                  # say where a page shows something else
    python site/figures.py --store NAME RESULTS --command "make demo" --machine "AMD EPYC, one core"

`RESULTS` is the results file of an experiment (`runs/demo/results.json`), or the tables that
`examples/train_to_budget.py` keeps (`runs/budget/budgets.json`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORED = Path(__file__).resolve().parent / "stored"
TABLE = re.compile(
    r"<!-- run: (?P<name>[\w-]+) -->\n(?P<shown>.*?)\n?<!-- end of run -->", re.DOTALL
)
# `<!-- run: NAME-numbers -->` is a block of code with the numbers of the run `NAME`.
NUMBERS = "-numbers"
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: its heading.
        figure: its name in the summary.
        scale: factor between the two.
        decimals: shown.
        spread: whether the spread over seeds is shown.
        ratio: whether the ratio to the first row is shown.
    """

    title: str
    figure: str
    scale: float = 1.0
    decimals: int = 1
    spread: bool = True
    ratio: bool = False

    def cell(self, row: Figures, first: Figures) -> str:
        """The text of a cell."""
        mean, std = (self.scale * row[self.figure][part] for part in ("mean", "std"))
        text = f"{mean:.{self.decimals}f}"
        if self.spread and std:
            text += f" ± {std:.{self.decimals}f}"
        if self.ratio and row is not first:
            text += f" ({mean / (self.scale * first[self.figure]['mean']):.2f}x)"
        return text


LAYOUTS: dict[str, tuple[Column, ...]] = {
    "demo": (
        Column("train accuracy (%)", "train_accuracy", 100, 2),
        Column("test accuracy (%)", "test_accuracy", 100, 2),
        Column("training (CPU s)", "train_cpu_seconds", spread=False, ratio=True),
        Column(
            "prediction (CPU ms a batch)", "predict_cpu_seconds", 1000, spread=False, ratio=True
        ),
        Column("test NFE", "nfe", ratio=True),
    ),
    "flow-long": (
        Column("test bits/dim", "test_bits", decimals=3),
        Column("test NFE", "nfe"),
        Column("training (CPU s)", "train_cpu_seconds"),
    ),
}


def loaded(name: str) -> dict[str, Any]:
    """A stored run."""
    found: dict[str, Any] = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def summed_up(name: str, summary: dict[str, Figures]) -> list[str]:
    """The lines of a table with a row for every variant."""
    columns = LAYOUTS[name]
    first = next(iter(summary.values()))
    lines = ["| | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for variant, row in summary.items():
        cells = " | ".join(column.cell(row, first) for column in columns)
        lines.append(f"| {variant} | {cells} |")
    return lines


def compared(tables: dict[str, Any]) -> list[str]:
    """The lines of one table of several tasks; their rows are stored as they are shown."""
    titles = next(iter(tables.values()))["rows"][0]
    lines = [f"| task, metric | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for task, found in tables.items():
        shown = f"{task}, {found['metric']}"
        for row in found["rows"][1:]:
            lines.append(f"| {shown} | {' | '.join(row)} |")
            shown = ""
    return lines


def numbers(name: str) -> str:
    """What the seeds of a stored comparison have reached, as a block of code for a picture."""
    lines = [
        "```python",
        "# Evaluations reached over those asked for, one number a seed.",
        "reached = {",
    ]
    for task, found in loaded(name)["tables"].items():
        shares = (f"{share}: {tuple(ratios)}" for share, ratios in found["reached"].items())
        lines.append(f'    "{task}": {{{", ".join(shares)}}},')
    return "\n".join([*lines, "}", "```"])


def table(name: str) -> str:
    """The table of a stored run, with a line that says where it comes from."""
    if name.endswith(NUMBERS):
        return numbers(name.removesuffix(NUMBERS))
    run = loaded(name)
    lines = compared(run["tables"]) if "tables" in run else summed_up(name, run["summary"])
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("python", "torch"))
    source = f"`{run['command']}`, {run['date']}, {run['machine']}, {versions}."
    return "\n".join([*lines, "", source])


def pages() -> list[Path]:
    """README and the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def wrong(text: str, tables: Callable[[str], str] = table) -> list[str]:
    """The names of the tables in a text that are not those of the stored runs."""
    return [
        found["name"] for found in TABLE.finditer(text) if found["shown"] != tables(found["name"])
    ]


def written(text: str, tables: Callable[[str], str] = table) -> str:
    """A text with the tables of the stored runs."""

    def replaced(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- run: {name} -->\n{tables(name)}\n<!-- end of run -->"

    return TABLE.sub(replaced, text)


def stored(results: dict[str, Any], command: str, machine: str, date: str) -> dict[str, Any]:
    """What is kept of a results file: summary or tables, and where they come from."""
    kept: dict[str, Any] = {"command": command, "date": date, "machine": machine}
    kept["versions"] = results["environment"]
    if "tables" in results:
        return kept | {"seeds": results["seeds"], "tables": results["tables"]}
    summary = {
        name: part
        for name, part in results.items()
        if name in {run["variant"] for run in results["runs"]}
    }
    return kept | {
        "settings": results["settings"],
        "seeds": sorted({run["seed"] for run in results["runs"]}),
        "summary": summary,
    }


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--store", nargs=2, metavar=("NAME", "RESULTS"), help="keep a run")
    parser.add_argument("--command", help="what has made the run")
    parser.add_argument("--machine", help="where")
    given = parser.parse_args(arguments)
    if given.store:
        name, results = given.store
        content = json.loads(Path(results).read_text())
        known = name in LAYOUTS or "tables" in content
        if not (known and given.command and given.machine):
            parser.error(f"give --command and --machine, and a name of {', '.join(LAYOUTS)}")
        made = datetime.date.fromtimestamp(Path(results).stat().st_mtime).isoformat()
        kept = stored(content, given.command, given.machine, made)
        (STORED / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    bad = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for name in wrong(text):
            print(f"{page.relative_to(ROOT)}: the table of {name} differs from the stored run")
            bad += 1
        if not given.check:
            page.write_text(written(text), encoding="utf-8")
    return int(bool(bad) and given.check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
