"""Names for the kinds of arguments, as `torchsde.types` has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Dict, Optional, Tuple, Union  # noqa: UP035

import torch
from torch import Tensor

__all__ = [
    "Any",
    "Callable",
    "Dict",
    "Module",
    "ModuleOrModules",
    "Modules",
    "Optional",
    "Scalar",
    "Sequence",
    "Size",
    "Sizes",
    "Tensor",
    "TensorOrTensors",
    "Tensors",
    "Tuple",
    "Union",
    "Vector",
]

Module = torch.nn.Module
Size = torch.Size
Modules = Sequence[Module]
Sizes = Sequence[Size]
Tensors = Sequence[Tensor]
ModuleOrModules = Module | Modules
Scalar = float | Tensor
TensorOrTensors = Tensor | Tensors
Vector = Sequence[float] | Tensor
