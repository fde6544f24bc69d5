"""Errors of a solve in the words of torchsde's functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What this package's own functions are called with, and what that is here; the longest first.
_WORDS = (
    ("Pass them as p=, make the field an nn.Module", "Make the sde an nn.Module"),
    ("(a mask passed as p=)", "(a mask in an attribute of the sde)"),
    ("Pass it as p=.", "Keep it in an attribute of the sde."),
    ("take FixedStep() with adjoint=DirectAdjoint()", "use sdeint with adaptive=False"),
    (
        ", go backward first, or keep no graphs: adjoint=DiscreteAdjoint(memory=0).",
        ", or go backward first.",
    ),
    ("Let them all be: adjoint=DiscreteAdjoint(memory=0).", "Use sdeint."),
    ("adjoint=DiscreteAdjoint()", "sdeint"),
    ("adjoint=DirectAdjoint()", "sdeint"),
    ("DiscreteAdjoint cannot run", "sdeint_adjoint cannot run"),
    ("field.eval()", "sde.eval()"),
)


@contextmanager
def in_torchsde_words() -> Iterator[None]:
    """Errors inside advise what can be done with `sdeint` and `sdeint_adjoint`."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        said = text = str(error)
        for ours, theirs in _WORDS:
            text = text.replace(ours, theirs)
        if type(error) not in (RuntimeError, TypeError, ValueError) or text == said:
            raise
        raise type(error)(text) from error
