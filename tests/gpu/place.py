"""The device that the cases run on, named by `PSN_TEST_DEVICE`."""

from __future__ import annotations

import os

import torch
from gpu import pretend

NAME = os.environ.get("PSN_TEST_DEVICE", "pretended")


def pretended() -> bool:
    """Whether it is the CPU that says it is another device."""
    return NAME == "pretended"


def device() -> torch.device:
    """The device."""
    return pretend.device() if pretended() else torch.device(NAME)
