"""The Julia package's own tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.julia, pytest.mark.slow]


def test_the_tests_of_the_julia_package_pass():
    script = (
        "import sys; from pysciml_node.julia_engine.commands.selftest import run_julia_tests; "
        "sys.exit(not run_julia_tests())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
