"""The results of all times, kept as data: benchmarks/history.jsonl has a line for each full run.

`benchmarks/results.py` adds the line: date, commit, processor, versions and every table as it was
printed. What has become of a row is shown by

    python benchmarks/history.py "pysciml_node" --table spiral
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).with_name("history.jsonl")


def tables_of(markdown: str) -> list[dict[str, Any]]:
    """The tables of a page: each with the last heading above it, its columns and its rows."""
    found: list[dict[str, Any]] = []
    heading, above = "", ""
    for line in markdown.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if not above.startswith("|"):
                found.append({"heading": heading, "columns": cells, "rows": []})
            elif set("".join(cells)) - set("-: "):
                found[-1]["rows"].append(cells)
        above = line
    return found


def commit() -> str:
    """The commit of the checkout, with a mark where files have been changed."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=HISTORY.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def add(markdown: str, about: dict[str, Any], path: Path = HISTORY) -> None:
    """Add a run's line.

    Args:
        markdown: what was printed.
        about: date, processor and versions.
        path: the file.
    """
    line = {**about, "commit": commit(), "tables": tables_of(markdown)}
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def course(row: str, table: str, path: Path = HISTORY) -> Iterator[str]:
    """What each run had in a row, the oldest first.

    Args:
        row: what its first cell is.
        table: words in the heading of its table.
        path: the file.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        for found in run["tables"]:
            if table not in found["heading"]:
                continue
            for cells in found["rows"]:
                if cells[0] == row:
                    values = zip(found["columns"][1:], cells[1:], strict=False)
                    shown = ", ".join(f"{name} {value}" for name, value in values)
                    yield f"{run['date']} {run['commit']} {found['heading']}: {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", help="first cell of the row")
    parser.add_argument("--table", default="", help="words in the heading of the table")
    arguments = parser.parse_args()
    for line in course(arguments.row, arguments.table):
        print(line)


if __name__ == "__main__":
    main()
