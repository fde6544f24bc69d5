"""The comparison of budgets with weights by hand, on a task whose outcomes are known."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "train_to_budget.py"))


def known_task(example: dict[str, Any], trained: list[str]) -> Any:
    """100 evaluations without a penalty; the score is their share of 100, and budgets are met."""

    def train(plan: Any, target: float | None, native: bool) -> Any:
        trained.append(plan.name)
        nfe = 100.0 / (1.0 + (plan.weight or 0.0)) if target is None else target
        return example["Outcome"](
            nfe, nfe / 100, 1.0, target=target, weights=[1.0, 2.0], costs=[nfe, nfe]
        )

    return example["Task"]("accuracy (%)", 100.0, (1.0, 4.0), train)


def test_a_budget_that_is_met_scores_as_the_weight_of_its_evaluations(
    example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    trained: list[str] = []
    task = known_task(example, trained)
    for _ in range(2):
        results = example["Results"](tmp_path / "known.json")
        example["compare_weights"]("known", task, results, [0, 1])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] == "0."]
    for row in rows:
        share, asked, reached, ratio, score, hand = row[0], *(row[i] for i in (1, 4, 7, 10, 13))
        assert float(asked) == float(reached) == float(score) == 100 * float(share)
        assert float(ratio) == 1.0
        assert float(hand) == pytest.approx(float(score))
    assert len(rows) == 6
    # Six runs a seed, each once.
    assert len(trained) == len(set(trained)) == 12
    assert (tmp_path / "known.png").stat().st_size > 0
