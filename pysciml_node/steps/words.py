"""Errors that a function of the user's raises: what it was given, and what mostly helps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pysciml_node.problems.state import tensors_of

FOREIGN = (RuntimeError, TypeError, ValueError, IndexError)
"""What torch, NumPy and Python raise where a function does not fit its arguments."""

_HINTS = (
    ("zero-dimensional tensor", "t has no axes: t.expand(len(u), 1) joins it to a batch."),
    ("same dtype", "Convert the state (u0.float(), u0.double()) or the field (module.to(dtype))."),
    ("same device", "Move the field (module.to(u0.device)) or u0."),
    ("expected device", "Move the field (module.to(u0.device)) or u0."),
    (
        "numpy() on Tensor that requires grad",
        "Compute with torch: a detached tensor has no gradients. Without gradients solve inside "
        "torch.no_grad().",
    ),
    (
        "only one element tensors can be converted",
        "Functions of math take single numbers: write torch.sin in place of math.sin.",
    ),
    (
        "shapes cannot be multiplied",
        "A linear layer takes the last axis of its input: compare its size with that of u.",
    ),
    ("2D or 3D input", "The first axis of a batch counts the samples: u0.unsqueeze(0) is one."),
)
"""Parts of messages, and what to do."""


def say_what_was_given(error: Exception, what: str, t: Tensor, state: Any) -> None:
    """Add to an error, once, the arguments that a function was called with.

    Args:
        error: what the function has raised.
        what: the function, in messages.
        t: the time.
        state: the state, in the structure of `u0`.
    """
    said = str(error)
    if hasattr(error, "__notes__") or "\n  " in said:  # it has its remedy
        return
    parts = list(tensors_of(state))
    shapes = ", ".join(str(tuple(part.shape)) for part in parts)
    kind = f"{parts[0].dtype} on {parts[0].device}"
    of = f"of shape {shapes}" if isinstance(state, Tensor) else f"whose parts have shapes {shapes}"
    error.add_note(
        f"{what[:1].upper()}{what[1:]} was called with a time of shape {tuple(t.shape)} and a "
        f"state {of}, {kind}."
    )
    for part, hint in _HINTS:
        if part in said:
            error.add_note(f"  {hint}")
            return
