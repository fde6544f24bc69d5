"""Checks of arguments: each returns what was given in the form the package works with, or refuses.

A refusal names the argument and says what was expected, what was given and, on a second line, what
to do. It is a `TypeError` for a value of the wrong kind and a `ValueError` for one out of range.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import operator
import os
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

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
    hint: str = "",
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
    remedy = f"\n  {hint}" if hint else ""
    raise error(f"{name} must be {expected}, but is {shown(value)}.{remedy}")


def as_float(value: object) -> float | None:
    """A real number of any kind as a `float`; `None` for what is no number.

    Numbers are Python's and NumPy's, and tensors without axes; booleans and text are none.
    """
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
    found = as_float(value)
    inside = (
        found is not None
        and (math.isfinite(found) or (infinite and math.isinf(found)))
        and (above is None or found > above)
        and (at_least is None or found >= at_least)
        and (below is None or found < below)
        and (at_most is None or found <= at_most)
    )
    if found is not None and inside:
        return found
    ends = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
    limits = [f"{word} {end:g}" for word, end in ends if end is not None]
    if not infinite and below is None and at_most is None:
        limits.insert(0, "finite")
    words = " and ".join(limits).replace("finite and above 0", "positive and finite")
    words = "positive" if words == "above 0" else words
    if above is not None and below is not None:
        words = f"between {above:g} and {below:g}"
    if found is None:
        refuse(name, "a number", value, hint)
    refuse(name, words or "a number", found, hint, ValueError)


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
    found = None if real is None else _as_whole(value)
    if (
        found is not None
        and (at_least is None or found >= at_least)
        and (at_most is None or found <= at_most)
    ):
        return found
    ends = (("at least", at_least), ("at most", at_most))
    limits = [
        f"{word} {end}" for word, end in ends if end is not None and (word, end) != ("at least", 1)
    ]
    kind = "positive " if at_least == 1 else ""
    expected = f"a {kind}whole number" + (f", {' and '.join(limits)}" if limits else "")
    refuse(name, expected, value, hint, TypeError if real is None else ValueError)


def _as_whole(value: Any) -> int | None:
    """A number as an `int`; `None` for one of a kind that has fractions."""
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
    refuse(name, "True or False", value)


def text(name: str, value: Any, *, hint: str = "") -> str:
    """A text that is not empty.

    Raises:
        TypeError: no text.
        ValueError: an empty one.
    """
    if isinstance(value, str) and value:
        return value
    kind = ValueError if isinstance(value, str) else TypeError
    refuse(name, "a text that is not empty", value, hint, kind)


def path(name: str, value: Any) -> Path:
    """A place in the file system, given as text or as a path.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, str | os.PathLike):
        refuse(name, "a path, or its text", value)
    if value == "":
        refuse(name, "a path, or its text", value, error=ValueError)
    return Path(value)


def choice(name: str, value: Any, known: Iterable[T]) -> T:
    """One of several values, most often names.

    Raises:
        ValueError: another one; the message says which was probably meant.

    Examples:
        >>> choice("noise", "diagonal", ("diagonal", "scalar"))
        'diagonal'
    """
    allowed = list(known)
    for one in allowed:
        if type(value) is type(one) and value == one:
            return one
    listed = ", ".join(f'"{one}"' if isinstance(one, str) else repr(one) for one in allowed)
    refuse(name, f"one of {listed}", value, did_you_mean(value, allowed), ValueError)


def nearest(given: object, known: Iterable[object]) -> str:
    """The known word nearest to a given one; empty where none is near."""
    if not isinstance(given, str):
        return ""
    words = {one.lower(): one for one in known if isinstance(one, str)}
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
        noun: what it is in words; default "an instance" of the example.
        example: how to make one, such as `"Tsit5()"`.

    Raises:
        TypeError: another object, or a class in place of its instance.
    """
    if isinstance(value, kind):
        return value
    made = isinstance(value, type) and issubclass(value, kind)
    hint = f"Write {value.__name__}()." if made else f"Write {example}."
    refuse(name, noun or f"an instance such as {example}", value, hint)


def generator(name: str, value: Any) -> torch.Generator | None:
    """A source of random numbers, or `None` for torch's own.

    Raises:
        TypeError: anything else, such as a seed.
    """
    if value is None or isinstance(value, torch.Generator):
        return value
    refuse(name, "a torch.Generator or None", value, "Write torch.Generator().manual_seed(0).")


def function(name: str, value: Any, *arguments: str, hint: str = "") -> Callable[..., Any]:
    """A callable that takes so many arguments by their places.

    Args:
        name: of the argument.
        value: what was given.
        arguments: what it is called with, in words.
        hint: what to do where it is refused.

    Raises:
        TypeError: not callable, a class in place of its instance, or another number of arguments.

    Examples:
        >>> function("f", lambda t: -t, "t", "u")
        Traceback (most recent call last):
        TypeError: f must be callable as f(t, u), but takes (t).
    """
    call = f"{name}({', '.join(arguments)})"
    if not callable(value):
        refuse(name, f"callable as {call}", value, hint)
    if isinstance(value, type):
        refuse(name, f"callable as {call}", value, f"Write {value.__name__}().")
    taken = parameters(value)
    if taken is not None and not takes(value, len(arguments)):
        remedy = f"\n  {hint}" if hint else ""
        raise TypeError(f"{name} must be callable as {call}, but takes {taken}.{remedy}")
    checked: Callable[..., Any] = value
    return checked


class _Signature:
    """What a callable takes, worked out once: a solve asks for it several times."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.shown: inspect.Signature | None = None
        with contextlib.suppress(TypeError, ValueError):
            found = inspect.signature(forward)
            self.shown = found.replace(return_annotation=inspect.Signature.empty)
        self._taken: dict[int, bool] = {}

    def takes(self, count: int) -> bool:
        """Whether so many arguments can be given by their places."""
        if count not in self._taken:
            self._taken[count] = True
            if self.shown is not None:
                try:
                    self.shown.bind(*range(count))
                except TypeError:
                    self._taken[count] = False
        return self._taken[count]


# Of functions, and of the same ones as methods.
_SIGNATURES: weakref.WeakKeyDictionary[types.FunctionType, dict[bool, _Signature]] = (
    weakref.WeakKeyDictionary()
)


def _signature(value: Callable[..., Any]) -> _Signature:
    forward = value.forward if isinstance(value, nn.Module) else value
    function = forward.__func__ if isinstance(forward, types.MethodType) else forward
    if not isinstance(function, types.FunctionType):
        return _Signature(forward)
    known = _SIGNATURES.setdefault(function, {})
    bound = forward is not function
    if bound not in known:
        known[bound] = _Signature(forward)
    return known[bound]


def parameters(value: Callable[..., Any]) -> inspect.Signature | None:
    """What a callable takes, by its signature; `None` where it shows none, as many built-ins do.

    Of a module it is what `forward` takes.
    """
    return _signature(value).shown


def takes(value: Callable[..., Any], count: int) -> bool:
    """Whether a callable can be called with so many arguments by their places."""
    return _signature(value).takes(count)


def keywords(
    where: str,
    given: Iterable[str],
    known: Iterable[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Refuse names that are no arguments, and say which were probably meant.

    Args:
        where: who takes them.
        given: names that were given.
        known: names that there are.
        elsewhere: what other packages call them, and what to write here.

    Raises:
        TypeError: an unknown name.
    """
    names = list(known)
    for name in given:
        if name not in names:
            other = (elsewhere or {}).get(name)
            near = f"Did you mean {other}?" if other else did_you_mean(name, names)
            near = near or f"It takes {', '.join(names) or 'none'}."
            raise TypeError(f"{where} takes no argument {name!r}.\n  {near}")


@cache
def _arguments(kind: type) -> tuple[str, ...] | None:
    """Names of the arguments that make an object of a class; `None` where any may be given."""
    found = inspect.signature(kind).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in found):
        return None
    return tuple(one.name for one in found)


class Configured:
    """Base of classes whose misspelled arguments are refused with the name that was meant."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an object that `__init__` then fills."""
        known = _arguments(cls) if kwargs else None  # type: ignore[arg-type]
        if known is not None:
            keywords(cls.__name__, kwargs, known)
        return super().__new__(cls)


def sequence(name: str, value: Any, kind: type[T], *, example: str) -> list[T]:
    """Objects of one class, given as a sequence or as a single one.

    Raises:
        TypeError: other objects.
    """
    if isinstance(value, kind):
        return [value]
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Tensor)
    if not listed or getattr(value, "ndim", 1) == 0:
        refuse(name, f"a sequence of objects such as {example}", value, f"Write {example}.")
    return [instance(f"{name}[{i}]", one, kind, example=example) for i, one in enumerate(value)]


def numbers(name: str, value: Any, *, hint: str = "") -> list[float]:
    """Real numbers of a sequence, or of a tensor or array with one axis; never NaN.

    Raises:
        TypeError: no sequence, or an entry that is no number.
        ValueError: another number of axes, or NaN.
    """
    if isinstance(value, Tensor):
        tensor(name, value, real=True)
    axes = getattr(value, "ndim", 1)
    if axes > 1:
        shape = tuple(value.shape)
        raise ValueError(f"{name} must be one-dimensional, but has shape {shape}.")
    words = isinstance(value, str | bytes)
    unordered = isinstance(value, Mapping | Set)
    if not isinstance(value, Iterable) or axes == 0 or words or unordered:
        refuse(name, "a sequence of numbers", value, hint)
    entries = value.detach().tolist() if isinstance(value, Tensor) else value
    return [number(f"{name}[{i}]", x, infinite=True) for i, x in enumerate(entries)]


def shape(name: str, value: Any, *, axes: int | None = None) -> tuple[int, ...]:
    """Sizes of axes, given as a sequence or as one number.

    Args:
        name: of the argument.
        value: what was given.
        axes: how many there must be.

    Raises:
        TypeError: no sequence of whole numbers.
        ValueError: a negative size, or another number of axes.
    """
    if isinstance(value, Tensor):
        value = tensor(name, value, axes=1).tolist()
    if as_float(value) is not None:
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refuse(name, "a sequence of sizes", value)
    sizes = tuple(whole(f"{name}[{i}]", size, at_least=0) for i, size in enumerate(value))
    if axes is not None and len(sizes) != axes:
        refuse(name, f"{axes} sizes", sizes, error=ValueError)
    return sizes


def tensor(
    name: str,
    value: Any,
    *,
    axes: int | None = None,
    real: bool = False,
    floating: bool = False,
    precise: bool = False,
    finite: bool = False,
    filled: bool = False,
    hint: str = "",
) -> Tensor:
    """A tensor that holds values, or anything that speaks DLPack, such as a NumPy array.

    Args:
        name: of the argument.
        value: what was given.
        axes: how many it must have.
        real: whether complex numbers and booleans are refused.
        floating: whether integers are refused too.
        precise: whether half precision is refused too.
        finite: whether NaN and infinity are refused.
        filled: whether a tensor without entries is refused.
        hint: what to do where it is refused.

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: another shape, no values (the meta device), not dense, or not finite.
    """
    found = as_tensor(value)
    if found is None:
        refuse(name, "a tensor", value, hint or f"Convert it: torch.as_tensor({name}).")
    if (real or floating or precise) and (found.is_complex() or found.dtype == torch.bool):
        view = f"Give its real view: torch.view_as_real({name})." if found.is_complex() else ""
        refuse(name, "a tensor of real numbers", found, hint or view)
    if precise and found.dtype not in (torch.float32, torch.float64):
        hint = hint or f"Convert it: {name}.double()."
        refuse(name, "a floating-point tensor, float32 or float64", found, hint)
    if floating and not found.is_floating_point():
        refuse(name, "a floating-point tensor", found, hint or f"Convert it: {name}.double().")
    if found.device.type == "meta":
        refuse(name, "a tensor with values", found, "It is on the meta device.", ValueError)
    if found.layout != torch.strided or found.is_quantized:
        dense = f"It is {found.layout}: write {name}.to_dense()."
        refuse(name, "a dense tensor", found, dense, ValueError)
    if axes is not None and found.ndim != axes:
        refuse(
            name, f"a tensor with {axes} ax{'i' if axes == 1 else 'e'}s", found, hint, ValueError
        )
    if filled and found.numel() == 0:
        refuse(name, "a tensor with entries", found, hint, ValueError)
    if finite and not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} must be finite, but holds NaN or infinity.")
    return found


def as_tensor(value: Any) -> Tensor | None:
    """A tensor, or a view of what speaks DLPack; `None` for what does not, or not of numbers."""
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__dlpack__") or isinstance(value, type):
        return None
    try:
        found: Tensor = from_dlpack(value)
        return found
    except (RuntimeError, TypeError, ValueError, BufferError):
        pass
    try:  # an array that must not be written to is not lent, but can be copied
        return torch.tensor(value)
    except (RuntimeError, TypeError, ValueError):
        return None


def settle(record: object, **values: Any) -> None:
    """Set fields of a frozen dataclass to what their checks have returned."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
