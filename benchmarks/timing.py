"""Pinning, interleaved timing and tables. Imports nothing numeric, so that pinning comes first."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from statistics import median, quantiles

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def pin(core: int | None) -> int:
    """Bind this process to one core and one thread; call it before a numeric library is loaded.

    XLA starts a thread for every core the process may run on, whatever its options say, so the
    affinity has to be set first.

    Returns:
        The core.
    """
    for name in _THREAD_VARIABLES:
        os.environ[name] = "1"
    allowed = sorted(os.sched_getaffinity(0))
    chosen = allowed[-1] if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


@dataclass(frozen=True)
class Spread:
    """Times of one call in milliseconds: median and quartiles of wall time, median of CPU time."""

    median: float
    low: float
    high: float
    cpu: float
    repeats: int

    @classmethod
    def of(cls, wall: Sequence[float], cpu: Sequence[float]) -> Spread:
        """Summarize samples in seconds."""
        low, middle, high = quantiles(wall, n=4)
        return cls(1e3 * middle, 1e3 * low, 1e3 * high, 1e3 * median(cpu), len(wall))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def interleave(
    calls: dict[str, Callable[[], object]], repeats: int, turn: float = 20e-3
) -> dict[str, Spread]:
    """Time all calls side by side, in turns A B C A B C ..., so that drifting speed hits all alike.

    A turn makes as many calls as fill `turn` seconds untimed, so that nothing of its neighbour is
    left in the caches, then as many timed ones, and counts their mean as one sample.

    Args:
        calls: what to time; each must return only when its work is done.
        repeats: samples of each.
        turn: least length of a sample in seconds.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, round(turn / (time.perf_counter() - start)))
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            for _ in range(counts[name]):
                call()
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(counts[name]):
                call()
            wall[name].append((time.perf_counter() - start) / counts[name])
            cpu[name].append((time.process_time() - start_cpu) / counts[name])
    return {name: Spread.of(wall[name], cpu[name]) for name in calls}


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or "unknown"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions, Python's own included; "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def show_members(
    description: str | None,
    names: list[str],
    rows: Callable[[int, list[str], int], list[list[str]]],
    counted: str,
) -> None:
    """Run a comparison of ensembles as its command line says, and print its table.

    Args:
        description: of the script.
        names: of all candidates.
        rows: those of a number of members, for some candidates and repeats.
        counted: what the third column counts.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--only", nargs="+", default=names)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    found = [row for size in asked.sizes for row in rows(size, asked.only, asked.repeats)]
    header = ["", "members", counted, "error", "of the gradient", "forward", "with gradient"]
    print(f"{table(header, found)}\n")
