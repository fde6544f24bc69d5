"""Tables in README and pages are those of the stored runs."""

import runpy
from pathlib import Path

import pytest

FIGURES = runpy.run_path(str(Path(__file__).parents[1] / "site" / "figures.py"))


@pytest.mark.parametrize("page", FIGURES["pages"](), ids=lambda page: page.name)
def test_pages_show_what_is_stored(page):
    assert FIGURES["wrong"](page.read_text(encoding="utf-8")) == []


def test_every_stored_run_is_shown():
    shown = "".join(page.read_text(encoding="utf-8") for page in FIGURES["pages"]())
    for run in FIGURES["STORED"].glob("*.json"):
        assert f"<!-- run: {run.stem} -->" in shown


def test_a_changed_number_is_found_and_written_again():
    text = "before\n<!-- run: demo -->\n| 1 |\n<!-- end of run -->\nafter"
    assert FIGURES["wrong"](text, lambda name: "| 2 |") == ["demo"]
    again = FIGURES["written"](text, lambda name: "| 2 |")
    assert again == text.replace("| 1 |", "| 2 |")
    assert FIGURES["wrong"](again, lambda name: "| 2 |") == []


def test_cells_have_mean_spread_and_ratio():
    column = FIGURES["Column"]("NFE", "nfe", decimals=1, ratio=True)
    first = {"nfe": {"mean": 100.0, "std": 0.0}}
    other = {"nfe": {"mean": 60.0, "std": 2.04}}
    assert column.cell(first, first) == "100.0"
    assert column.cell(other, first) == "60.0 ± 2.0 (0.60x)"


def test_a_comparison_names_each_task_once():
    rows = [["budget", "reached"], ["none", "100"], ["0.6", "60"]]
    lines = FIGURES["compared"]({"digits": {"metric": "accuracy (%)", "rows": rows}})
    assert lines[0] == "| task, metric | budget | reached |"
    assert lines[2:] == ["| digits, accuracy (%) | none | 100 |", "|  | 0.6 | 60 |"]


def test_numbers_for_a_picture_are_those_of_the_seeds():
    block = FIGURES["table"]("budgets-numbers").removeprefix("```python\n").removesuffix("```")
    shown = {}
    exec(block, shown)
    for task, found in FIGURES["loaded"]("budgets")["tables"].items():
        assert {str(k): list(v) for k, v in shown["reached"][task].items()} == found["reached"]
