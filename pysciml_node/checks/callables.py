"""Callables and their arguments: what may be called how, and names that are no arguments."""

from __future__ import annotations

import ast
import contextlib
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim.swa_utils import AveragedModel

from pysciml_node.checks.values import did_you_mean, refuse


def function(name: str, value: Any, *places: str, hint: str = "") -> Callable[..., Any]:
    """A callable that takes the arguments named, by their places.

    Args:
        name: of the argument.
        value: what was given.
        places: the names of its arguments, in words.
        hint: what to do where it is refused.

    Raises:
        TypeError: not callable, a class in place of its instance, another number of arguments, or
            the time not first where `places` begin with it.

    Examples:
        >>> function("f", lambda t: -t, "t", "u")
        Traceback (most recent call last):
        TypeError: f must be callable as f(t, u), but takes (t).
          Give a function, a module or a lambda t, u: ...
    """
    named = ", ".join(places)
    call = f"{name}({named})"
    hint = hint or f"Give a function, a module or a lambda {named}: ..."
    if not callable(value):
        refuse(name, f"callable as {call}", value, hint)
    if isinstance(value, type):
        refuse(name, f"callable as {call}", value, f"Write {value.__name__}().")
    if not takes(value, len(places)):
        taken = parameters(value)
        raise TypeError(f"{name} must be callable as {call}, but takes {taken}.\n  {hint}")
    if places[:1] == ("t",):
        expect_time_first(name, value)
    checked: Callable[..., Any] = value
    return checked


# Names of the state in functions for other packages, where it comes before the time.
_STATES = frozenset({"u", "y", "x", "z", "h", "state"})
_TIMES = frozenset({"t", "time"})


def expect_time_first(name: str, value: Callable[..., Any]) -> None:
    """Refuse a function of a state, and perhaps of other things, and of the time behind it or not.

    SciML calls `f(u, p, t)`, SciPy's `odeint` `f(y, t)`, and `f(u, rate=1.0)` has an option. Where
    it is called as `f(t, u, p)` such a function often computes something, which is wrong.

    Args:
        name: of the argument.
        value: the function.

    Raises:
        TypeError: its signature says so.
    """
    taken = arguments(value)
    first, *others = taken.names
    late = next((other for other in others if other in _TIMES), None)
    if first in _STATES and late is not None:
        order = ", ".join([late, first, *(other for other in others if other and other != late)])
        raise TypeError(
            f"{name} is called as {name}(t, u), the time first, but takes {taken.shown}.\n"
            f"  Swap its arguments: {name}({order})."
        )
    if taken.settles_second and first not in _TIMES:
        raise TypeError(
            f"{name} is called as {name}(t, u), the time first, but takes {taken.shown}, whose "
            f"second argument has a default.\n  A function of the state alone is "
            f"lambda t, {first}: {name}({first}), and one of both has no default for the second."
        )


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """How a callable is called: what it wraps is asked only where it hands on what it is given.

    `functools.wraps` would show the function inside, which an adapter calls in a way of its own.
    """
    with contextlib.suppress(TypeError, ValueError):
        own = inspect.signature(forward, follow_wrapped=False)
        if not any(x.kind is x.VAR_POSITIONAL for x in own.parameters.values()):
            return own
    try:
        return inspect.signature(forward)
    except ValueError:
        return _documented(forward)


def _documented(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature that the documentation of a built-in begins with, as of torch's functions.

    Raises:
        ValueError: it has none, or there is more than one way to call it.
    """
    says = (forward.__doc__ or "").strip()
    head = says.partition("\n")[0].partition(" -> ")[0]
    if ".. function::" in says:
        raise ValueError(f"{forward!r} is called in more ways than one")
    try:
        (made,) = ast.parse(f"def {head}: ...").body
    except SyntaxError as error:
        raise ValueError(f"no signature in the documentation of {forward!r}") from error
    assert isinstance(made, ast.FunctionDef)
    given, taken = made.args, inspect.Parameter
    named, defaults = [*given.posonlyargs, *given.args], [*map(ast.literal_eval, given.defaults)]
    defaults = [taken.empty] * (len(named) - len(defaults)) + defaults
    listed = [
        taken(x.arg, taken.POSITIONAL_OR_KEYWORD, default=default)
        for x, default in zip(named, defaults, strict=True)
    ]
    if given.vararg is not None:
        listed.append(taken(given.vararg.arg, taken.VAR_POSITIONAL))
    return inspect.Signature(listed)


class Arguments:
    """The arguments that a callable takes, worked out once: every problem and solve asks.

    Attributes:
        shown: its signature; `None` where there is none to read, as for many built-ins.
        names: of the first three, empty where there are none.
        settles_second: whether the second has a default.
        known_as_field: whether they have been found to be those of a function of time and state.
    """

    known_as_field = False

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.shown: inspect.Signature | None = None
        with contextlib.suppress(TypeError, ValueError):
            signature = _signature(forward)
            self.shown = signature.replace(return_annotation=inspect.Signature.empty)
        names = [] if self.shown is None else list(self.shown.parameters)
        self.names = (*names, "", "", "")[:3]
        second = [] if self.shown is None else [*self.shown.parameters.values()][1:2]
        self.settles_second = any(
            x.kind is x.POSITIONAL_OR_KEYWORD and x.default is not x.empty for x in second
        )
        self._taken: dict[int, bool] = {}

    def takes(self, count: int) -> bool:
        """Whether it takes `count` arguments by their places."""
        if count not in self._taken:
            self._taken[count] = True
            if self.shown is not None:
                try:
                    self.shown.bind(*range(count))
                except TypeError:
                    self._taken[count] = False
        return self._taken[count]


# The signatures of a function, by its identity: as itself, and as a bound method. All that have
# nothing but their code have the same, as those that are made anew for each solve.
_SIGNATURES: dict[tuple[int, bool], tuple[weakref.ref[Any], Arguments]] = {}


_AROUND = frozenset((nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel))
"""Modules that hand what they are given on to another one, their `module`."""

_CALLED_AS_SAID = (types.FunctionType, types.MethodType)

_OWN_WORDS = ("__signature__", "__wrapped__")
"""Attributes by which an object says itself how it is called."""


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """`forward` of a module, or of the one that a compiled or averaged module, say, stands for."""
    name = "_orig_mod" if _AROUND.isdisjoint(type(module).__mro__) else "module"
    held = module._modules  # of a scripted module no dict
    inner = held[name] if name in held else None  # noqa: SIM401
    return module.forward if inner is None else _forward_of(inner)


def arguments(value: Callable[..., Any]) -> Arguments:
    """The arguments that a callable takes; those of `forward` for a module."""
    forward = _forward_of(value) if isinstance(value, nn.Module) else value
    if not isinstance(forward, _CALLED_AS_SAID):
        call = type(forward).__dict__.get("__call__")
        if type(call) is types.FunctionType and not any(hasattr(forward, x) for x in _OWN_WORDS):
            forward = call.__get__(forward)  # an object whose class says how it is called
    function = forward.__func__ if isinstance(forward, types.MethodType) else forward
    if not isinstance(function, types.FunctionType):
        return Arguments(forward)
    more = function.__defaults__ or function.__kwdefaults__ or function.__dict__
    says = function if more else function.__code__
    key = id(says), function is not forward
    known = _SIGNATURES.get(key)
    if known is None or known[0]() is not says:
        gone = weakref.ref(says, lambda _: _SIGNATURES.pop(key, None))
        known = _SIGNATURES[key] = gone, Arguments(forward)
    return known[1]


def parameters(value: Callable[..., Any]) -> inspect.Signature | None:
    """The arguments that a callable takes, in words; those of `forward` for a module.

    It is `None` where there is no signature to read, as for many built-ins.
    """
    return arguments(value).shown


def takes(value: Callable[..., Any], count: int) -> bool:
    """Whether a callable takes `count` arguments by their places."""
    return arguments(value).takes(count)


def keywords(
    where: str,
    given: Iterable[str],
    known: Iterable[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Refuse names that are no arguments, and say which were probably meant.

    Args:
        where: function or class that takes the arguments.
        given: names that were given.
        known: names that it takes.
        elsewhere: what other packages call them, and what to write here.

    Raises:
        TypeError: an unknown name.
    """
    names = list(known)
    for name in given:
        if name not in names:
            translated = (elsewhere or {}).get(name)
            near = f"Did you mean {translated}?" if translated else did_you_mean(name, names)
            near = near or f"It takes {', '.join(names) or 'none'}."
            raise TypeError(f"{where} takes no argument {name!r}.\n  {near}")


@cache
def _arguments(kind: type) -> tuple[str, ...] | None:
    """Names of the arguments that make an object of a class; `None` where any may be given."""
    listed = inspect.signature(kind).parameters.values()
    if any(argument.kind is argument.VAR_KEYWORD for argument in listed):
        return None
    return tuple(argument.name for argument in listed)


class Configured:
    """Base of classes whose misspelled arguments are refused with the name that was meant."""

    _elsewhere: ClassVar[Mapping[str, str]] = {}
    """What other packages call the arguments, and what to write here."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an object that `__init__` then fills."""
        known = _arguments(cls) if kwargs else None  # type: ignore[arg-type]
        if known is not None:
            keywords(cls.__name__, kwargs, known, cls._elsewhere)
        return super().__new__(cls)
