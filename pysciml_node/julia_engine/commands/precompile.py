"""The command `precompile`: load everything once, so that nothing is compiled later."""

from __future__ import annotations

import argparse
import sys
import time

from pysciml_node.errors import EngineUnavailable
from pysciml_node.julia_engine.process import env, launch, runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options: the command takes none."""
    del parser


def precompile() -> list[str]:
    """Start Julia and load the engine with every package that solves may ask for.

    Returns:
        The packages that are not in the project or do not load.

    Raises:
        EngineUnavailable: Julia or the engine does not start.
    """
    start = time.perf_counter()
    runtime.start()
    print(f"engine: ready after {time.perf_counter() - start:.1f} s ({launch.describe()})")
    failed = []
    for name in env.optional_packages():
        start = time.perf_counter()
        try:
            runtime.require(name)
        except EngineUnavailable as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
        else:
            print(f"{name}: ready after {time.perf_counter() - start:.1f} s")
    return failed


def run(arguments: argparse.Namespace) -> int:
    """Precompile, and say how long each part took.

    Args:
        arguments: not used.

    Returns:
        0, or 1 when a package is missing.
    """
    del arguments
    return 1 if precompile() else 0
