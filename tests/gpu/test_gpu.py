"""The cases of `device_cases.py`, and the conformance suite, on another device than the CPU.

Each device has a process of its own: torch has one accelerator in a process, and it has to be
registered before the first backward.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

TESTS = Path(__file__).parents[1]


def _run(device: str, *arguments: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"PSN_TEST_DEVICE": device, "PYSCIML_NODE_JULIA": "/no/such/julia"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="This torch has no backends that are written in Python.",
)
def test_on_a_pretended_device() -> None:
    _run("pretended", str(TESTS / "gpu" / "device_cases.py"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")
def test_on_a_gpu() -> None:
    _run("cuda", str(TESTS / "gpu" / "device_cases.py"), str(TESTS / "conformance"))
