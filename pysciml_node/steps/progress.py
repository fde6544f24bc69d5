"""A progress bar for long solves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO

from pysciml_node.problems.ode import Problem


class ProgressLine:
    """One line on a terminal, rewritten at most ten times a second."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label, self.stream = label, stream or sys.stderr
        self.last = 0.0

    def show(self, fraction: float, note: str, final: bool = False) -> None:
        """Draw the line at `fraction` of the whole."""
        now = time.monotonic()
        if not final and now - self.last < 0.1:
            return
        self.last = now
        filled = int(24 * min(max(fraction, 0.0), 1.0))
        bar = "#" * filled + "." * (24 - filled)
        self.stream.write(f"\r{self.label} [{bar}] {fraction:6.1%} {note}" + "\n" * final)
        self.stream.flush()


Listener = Callable[[Any], None]


def step_listener(enabled: bool, problem: Problem) -> AbstractContextManager[Listener | None]:
    """A listener for accepted steps that draws a solve's progress; `None` where not wanted."""
    return _drawing(problem) if enabled else nullcontext()


@contextmanager
def _drawing(problem: Problem) -> Iterator[Listener]:
    line, length, steps = ProgressLine("solve"), problem.t1 - problem.t0, 0
    fraction = 0.0

    def on_step(step: Any) -> None:
        nonlocal steps, fraction
        steps += 1
        fraction = (step.end - problem.t0) / length
        line.show(fraction, f"t={step.end:.4g} dt={step.h:.2g} steps={steps}")

    try:
        yield on_step
    finally:
        line.show(fraction, f"steps={steps}", final=True)
