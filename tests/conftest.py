"""Settings shared by all tests."""

from __future__ import annotations

import torch

# The states here are tiny: threads would only wait for one another.
torch.set_num_threads(1)
