"""The command `test`: the tests of the Julia package, and those that every engine must pass."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from pysciml_node.julia_engine.process import env, runtime
from pysciml_node.julia_engine.process.errors import translate

_CONFORMANCE = Path(__file__).resolve().parents[3] / "tests" / "conformance"

# The tests of the Julia package run in the process that Python has started, as everything does.
_INCLUDE = """
function (file)
    host = Module(:PySciMLNodeTests)
    Core.eval(host, :(include(path) = Base.include($host, path)))
    Base.include(host, file)
    return nothing
end
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options: the command takes none."""
    del parser


def run_julia_tests() -> bool:
    """Run the tests of the bundled Julia package; return whether they passed.

    Raises:
        EngineUnavailable: Julia or the engine does not start.
    """
    file = env.bundled_project() / "test" / "runtests.jl"
    runtime.start()
    try:
        sys.modules["juliacall"].Main.seval(_INCLUDE)(str(file))
    except sys.modules["juliacall"].JuliaError as error:
        print(translate(error), file=sys.stderr)
        return False
    return True


def run_conformance_tests() -> bool | None:
    """Run the conformance tests on every engine; return whether they passed, None without them."""
    if not _CONFORMANCE.is_dir() or importlib.util.find_spec("pytest") is None:
        return None
    command = [sys.executable, "-m", "pytest", str(_CONFORMANCE)]
    return subprocess.run(command, cwd=_CONFORMANCE.parents[1], check=False).returncode == 0


def run(arguments: argparse.Namespace) -> int:
    """Run both suites.

    Args:
        arguments: not used.

    Returns:
        0 when everything passed.
    """
    del arguments
    passed = run_julia_tests()
    print(f"tests of the Julia package: {'passed' if passed else 'failed'}")
    conformed = run_conformance_tests()
    if conformed is None:
        print("conformance tests: not here (they come with a checkout, and need pytest)")
        return 0 if passed else 1
    print(f"conformance tests: {'passed' if conformed else 'failed'}")
    return 0 if passed and conformed else 1
