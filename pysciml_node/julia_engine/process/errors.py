"""Julia's exceptions, as ours."""

from __future__ import annotations

from typing import Any

from pysciml_node.errors import JuliaError


def translate(error: Any) -> BaseException:
    """The exception to raise for one of juliacall's.

    Args:
        error: a `juliacall.JuliaError`.

    Returns:
        A `KeyboardInterrupt` for Julia's `InterruptException`, else a `JuliaError`. Neither refers
        to objects of Julia's, so that they keep nothing alive and can be pickled.
    """
    import juliacall

    base = juliacall.Base
    exception = error.exception
    name = str(base.nameof(base.typeof(exception)))
    if name == "InterruptException":
        return KeyboardInterrupt()
    message = str(base.sprint(base.showerror, exception))
    return JuliaError(name, message, str(error))
