"""What the way back of the reversible Heun method keeps of the way forward."""

from __future__ import annotations

import torch

from pysciml_node.steps.record import Record
from pysciml_node.steps.step import Step
from pysciml_node.stochastic.reversible import SparseSaver


def test_what_is_kept_does_not_grow_with_the_number_of_steps() -> None:
    """Saved times are kept whatever their place; the others lie at equal distances."""
    for steps in (20, 1_000, 10_000):
        h = 1 / steps
        ends = [n * h for n in range(steps + 1)]
        saver = SparseSaver(
            Record(times=[0.0]), torch.zeros(2), lambda *_: torch.zeros(1, 2), [ends[-7], ends[-1]]
        )
        for n in range(steps):
            u = torch.full((2,), float(n + 1))
            saver.see(Step(ends[n], h, ends[n + 1], u, u, 0.0, None, 0.0, h))
        assert len(saver.kept) <= 35
        assert {steps - 6, steps} <= set(saver.kept)
        assert all(u[0] == n for n, u in saver.kept.items())
        assert [u[0] for u in saver.states] == [0, steps]
        gaps = torch.tensor([0, *sorted(saver.kept)]).diff()
        assert gaps.max() <= max(1, steps / 16)
