"""The device that the cases run on, named by `PSN_TEST_DEVICE`."""

from __future__ import annotations

import os

import torch

NAME = os.environ.get("PSN_TEST_DEVICE", "pretended")


def pretended() -> bool:
    """Whether it is the CPU that says it is another device."""
    return NAME == "pretended"


def device() -> torch.device:
    """The device."""
    if not pretended():
        return torch.device(NAME)
    # Older torch has no backends in Python.
    from gpu import pretend

    return pretend.device()
