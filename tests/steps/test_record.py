"""Records of steps."""

from __future__ import annotations

import math

import pytest
import torch

from pysciml_node.steps.record import Record, finite_part


@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_the_finite_part_is_what_a_record_keeps_that_is_cut_there(bad: int) -> None:
    """Of three steps from 0 to 3: saved times lie inside each of them, and at all of their ends."""
    times, asked = [0.0, 1.0, 2.0, 3.0], [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    places = [(t, math.nan) if t in times else (int(t), t % 1) for t in asked]
    record = Record(times, [1.0] * 3, [0.0] * 3, [None] * 3, saved=len(asked))
    record.place(asked, places)
    record.truncate(bad)
    ends = torch.ones(4, 2)
    ends[bad:, 0] = math.inf
    assert finite_part(ends, places) == (record.naccept, record.saved)
