"""The form of a refusal, and checks of single values: numbers, flags, words, objects."""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

_LONGEST = 60


def shown(value: object) -> str:
    """A value in the words of an error message: short, and with its kind."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:
        text = repr(value)
    except Exception:  # a fault of the object, which must not hide the message
        return f"an object of type {kind}"
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    return text if isinstance(value, int | float) else f"{text} ({kind})"


def refuse(
    name: str,
    expected: str,
    value: object,
    hint: str,
    error: type[TypeError | ValueError] = TypeError,
) -> NoReturn:
    """Raise an error that says what was given instead of what was expected.

    Args:
        name: of the argument.
        expected: ends the sentence "... must be".
        value: what was given.
        hint: what to do.
        error: its type; a `ValueError` for a value that is only out of range.
    """
    raise error(f"{name} must be {expected}, but is {shown(value)}.\n  {hint}")


def written(name: str, example: str) -> str:
    """The remedy that shows how an argument is written, by its keyword where it has one."""
    return f"Write {name}={example}." if name.isidentifier() else f"Write {example}."


def as_float(value: object) -> float | None:
    """A real number of any kind as a `float`; `None` for anything else.

    Numbers are Python's and NumPy's, and tensors without axes. Booleans and text do not count.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        stored = value.layout == torch.strided and value.device.type != "meta"
        real = not value.is_complex() and value.dtype != torch.bool and not value.is_quantized
        return float(value.detach()) if value.ndim == 0 and stored and real else None
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return None
    # NumPy's booleans, words and dates have the method as well.
    if (
        getattr(value, "ndim", 0)
        or getattr(getattr(value, "dtype", None), "kind", "f") not in "iuf"
    ):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
    hint: str = "",
) -> float:
    """A real number, never NaN.

    Args:
        name: of the argument.
        value: what was given: a number of Python or NumPy, or a tensor without axes.
        above: it must be larger.
        at_least: it must not be smaller.
        below: it must be smaller.
        at_most: it must not be larger.
        infinite: whether infinity is allowed.
        hint: what to do where it is refused.

    Raises:
        TypeError: no real number.
        ValueError: NaN, or out of range.

    Examples:
        >>> number("rtol", torch.tensor(0.5), above=0)
        0.5
    """
    real = as_float(value)
    inside = (
        real is not None
        and (math.isfinite(real) or (infinite and math.isinf(real)))
        and (above is None or real > above)
        and (at_least is None or real >= at_least)
        and (below is None or real < below)
        and (at_most is None or real <= at_most)
    )
    if real is not None and inside:
        return real
    ends = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
    limits = [f"{word} {end:g}" for word, end in ends if end is not None]
    if not infinite and below is None and at_most is None:
        limits.insert(0, "finite")
    words = " and ".join(limits).replace("finite and above 0", "positive and finite")
    words = "positive" if words == "above 0" else words
    if above is not None and below is not None:
        words = f"between {above:g} and {below:g}"
    if real is None:
        refuse(name, "a number", value, hint or _as_number(name, value, "float"))
    low = max((bound for bound in (above, at_least) if bound is not None), default=-math.inf)
    refuse(name, words or "a number", real, hint or _nearer(real, low), ValueError)


def _as_number(name: str, value: object, kind: str) -> str:
    """The remedy for what is no number."""
    return f"Convert it: {kind}({name})." if isinstance(value, str | bytes) else "Give one number."


def _nearer(real: float, low: float) -> str:
    """The remedy for a number out of a range that begins at `low`."""
    if math.isnan(real):
        return "NaN comes from a computation such as 0/0: look for it where the number was made."
    if math.isinf(real):
        return "Give a finite one."
    return "Give a larger one." if real <= low else "Give a smaller one."


def whole(
    name: str, value: Any, *, at_least: int | None = 1, at_most: int | None = None, hint: str = ""
) -> int:
    """A whole number: of Python or NumPy, or a tensor of integers without axes.

    Args:
        name: of the argument.
        value: what was given.
        at_least: it must not be smaller.
        at_most: it must not be larger.
        hint: what to do where it is refused.

    Raises:
        TypeError: no number.
        ValueError: a number with a fraction, or one out of range.
    """
    real = as_float(value)
    count = None if real is None else _as_whole(value)
    if (
        count is not None
        and (at_least is None or count >= at_least)
        and (at_most is None or count <= at_most)
    ):
        return count
    ends = (("at least", at_least), ("at most", at_most))
    limits = [
        f"{word} {end}" for word, end in ends if end is not None and (word, end) != ("at least", 1)
    ]
    kind = "positive " if at_least == 1 else ""
    expected = f"a {kind}whole number" + (f", {' and '.join(limits)}" if limits else "")
    if real is None:
        refuse(name, expected, value, hint or _as_number(name, value, "int"))
    low = -math.inf if at_least is None else at_least
    remedy = "Round it: round(x) of a number x is whole." if count is None else _nearer(real, low)
    refuse(name, expected, value, hint or remedy, ValueError)


def _as_whole(value: Any) -> int | None:
    """A number as an `int`; `None` for a number of a kind that has fractions."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def flag(name: str, value: Any) -> bool:
    """`True` or `False`, of Python or NumPy.

    Raises:
        TypeError: anything else: words and numbers are no flags.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    refuse(name, "True or False", value, written(name, "True"))


def text(name: str, value: Any, *, hint: str = "") -> str:
    """A text that is not empty.

    Raises:
        TypeError: no text.
        ValueError: an empty one.
    """
    if isinstance(value, str) and value:
        return value
    kind = ValueError if isinstance(value, str) else TypeError
    refuse(name, "a text that is not empty", value, hint or written(name, '"..."'), kind)


def path(name: str, value: Any) -> Path:
    """A place in the file system, given as text or as a path.

    Raises:
        TypeError: something else.
    """
    hint = 'Write "folder/file", or pathlib.Path("folder") / "file".'
    if not isinstance(value, str | os.PathLike):
        refuse(name, "a path, or its text", value, hint)
    if value == "":
        refuse(name, "a path, or its text", value, hint, ValueError)
    return Path(value)


def choice(name: str, value: Any, known: Iterable[T]) -> T:
    """One of several values, most often names.

    Raises:
        ValueError: another value; the message says which was probably meant.

    Examples:
        >>> choice("noise", "diagonal", ("diagonal", "scalar"))
        'diagonal'
    """
    allowed = list(known)
    for option in allowed:
        if type(value) is type(option) and value == option:
            return option
    options = [f'"{option}"' if isinstance(option, str) else repr(option) for option in allowed]
    hint = did_you_mean(value, allowed) or written(name, options[0])
    refuse(name, f"one of {', '.join(options)}", value, hint, ValueError)


def nearest(given: object, known: Iterable[object]) -> str:
    """The known word nearest to a given one; empty where none is near."""
    if not isinstance(given, str):
        return ""
    words = {word.lower(): word for word in known if isinstance(word, str)}
    near = difflib.get_close_matches(given.lower(), words, 1)
    return words[near[0]] if near else ""


def did_you_mean(given: object, known: Iterable[object]) -> str:
    """The sentence that names the known word nearest to a given one; empty where none is near."""
    near = nearest(given, known)
    return f"Did you mean {near!r}?" if near else ""


def instance(name: str, value: Any, kind: type[T], *, example: str, noun: str = "") -> T:
    """An object of one class.

    Args:
        name: of the argument.
        value: what was given.
        kind: the class.
        noun: the object in words; default "an instance" of the example.
        example: how to make one, such as `"Tsit5()"`.

    Raises:
        TypeError: another object, or a class in place of its instance.
    """
    if isinstance(value, kind):
        return value
    is_class = isinstance(value, type) and issubclass(value, kind)
    hint = f"Write {value.__name__}()." if is_class else f"Write {example}."
    refuse(name, noun or f"an instance such as {example}", value, hint)


def generator(name: str, value: Any) -> torch.Generator | None:
    """A source of random numbers, or `None` for torch's own.

    Raises:
        TypeError: anything else, such as a seed.
    """
    if value is None or isinstance(value, torch.Generator):
        return value
    refuse(name, "a torch.Generator or None", value, "Write torch.Generator().manual_seed(0).")


def settle(record: object, **values: Any) -> None:
    """Set fields of a frozen dataclass to what their checks have returned."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
