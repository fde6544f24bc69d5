"""Results of benchmarks are kept as data, and read again."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

HISTORY = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "history.py"))
PAGE = """# Results

## Adaptive solves

### spiral, forward

| row          | ms   | ratio |
| ------------ | ---: | ----: |
| torchdiffeq  | 2.33 | 1     |
| pysciml_node | 1.07 | 0.46  |

### mnist, forward

| row          | ms | ratio |
|---|---:|---:|
| pysciml_node | 56 | 0.29 |
"""


def test_tables_come_back_as_they_were_printed(tmp_path: Path) -> None:
    spiral, mnist = HISTORY["tables_of"](PAGE)
    assert spiral["heading"] == "spiral, forward"
    assert spiral["columns"] == ["row", "ms", "ratio"]
    assert spiral["rows"] == [["torchdiffeq", "2.33", "1"], ["pysciml_node", "1.07", "0.46"]]
    assert mnist["rows"] == [["pysciml_node", "56", "0.29"]]


def test_the_course_of_a_row_is_that_of_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for date, page in (("2026-01-01", PAGE), ("2026-02-01", PAGE.replace("1.07", "0.90"))):
        HISTORY["add"](page, {"date": date, "versions": {"torch": "2.13.0"}}, path)
    assert [json.loads(line)["date"] for line in path.read_text().splitlines()] == [
        "2026-01-01",
        "2026-02-01",
    ]
    first, second = HISTORY["course"]("pysciml_node", "spiral", path)
    assert first.startswith("2026-01-01 ")
    assert first.endswith("spiral, forward: ms 1.07, ratio 0.46")
    assert second.endswith("ms 0.90, ratio 0.46")


def test_the_history_in_the_repository_can_be_read() -> None:
    if HISTORY["HISTORY"].exists():
        assert list(HISTORY["course"]("", "")) == []
