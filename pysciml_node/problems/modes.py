"""The modes that torch may be in where a solve is called, and what a solve makes of them.

Inference mode and autocast are for the user's field, not for the solver's own sums: the solver
leaves them, and the field is evaluated in the autocast that it was solved in, in the forward pass
and in every replay. `torch.compile` leaves a solve out. Transforms of `torch.func` and derivatives
in forward mode go through a solve whose every operation is recorded, and are refused elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import Problem
from pysciml_node.problems.state import map_tensors, tensors_of

P = TypeVar("P", bound=Problem | EnsembleProblem)
R = TypeVar("R")
Arguments = ParamSpec("Arguments")
Check = Callable[[Tensor], None]

_UNCOMPILED = "the steps of a solve depend on values: it runs uncompiled"
_FUNCTIONS = ("f", "drift", "diffusion")


@dataclass(frozen=True)
class Autocast:
    """The autocast of a place in a program.

    Args:
        device_type: whose operations it is for.
        dtype: what they are cast to.
    """

    device_type: str
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Autocast | None:
        """That of the caller, or `None` where it is off."""
        kind = device.type
        if not torch.is_autocast_enabled(kind):
            return None
        return cls(kind, torch.get_autocast_dtype(kind))

    def entered(self) -> torch.autocast:
        """The context in which it is on again."""
        # No cache: a weight that was cast without gradients would be found by the replay.
        return torch.autocast(self.device_type, self.dtype, cache_enabled=False)


@dataclass(frozen=True)
class InModes:
    """A function of a problem, evaluated in the modes in which `solve` was called.

    Args:
        function: the user's.
        dtype: the state's; outputs of the autocast's precision are cast to it.
        autocast: the autocast to evaluate it in.
        check: looks at each tensor that it returns.
    """

    function: Callable[..., Any]
    dtype: torch.dtype
    autocast: Autocast | None
    check: Check | None

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns, in the state's precision."""
        if self.autocast is None:
            out = self.function(*arguments)
        else:
            with self.autocast.entered():
                out = self.function(*arguments)
            out = map_tensors(self._cast, out)
        if self.check is not None:
            for x in tensors_of(out):
                self.check(x)
        return out

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if self.autocast and x.dtype == self.autocast.dtype else x


@contextmanager
def ordinary_modes(device: torch.device) -> Iterator[None]:
    """Neither inference mode nor autocast, for the solver's own operations and what it keeps.

    Gradients stay as they are outside: inference mode has none.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


@contextmanager
def solvable(problem: P, forward_mode: bool = True) -> Iterator[P]:
    """The problem as it can be solved, in ordinary modes for the duration.

    Args:
        problem: as it was given.
        forward_mode: whether derivatives in forward mode can pass through.

    Raises:
        RuntimeError: a transform is active that does not go through, or an export.
    """
    device = (problem.problem if isinstance(problem, EnsembleProblem) else problem).spec.device
    autocast = Autocast.now(device)
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        raise RuntimeError(
            "a solve cannot be exported or traced: its steps depend on the values, and a recording "
            "would repeat those of its example.\n"
            "  Export the field and the layers around the solve, and solve between them."
        )
    if not forward_mode and forward_ad._current_level >= 0:
        raise RuntimeError(
            "a solve was called where derivatives in forward mode are taken, and its adjoint gives "
            "those in reverse mode alone.\n  Use adjoint=DirectAdjoint()."
        )
    check = None
    if torch._C._are_functorch_transforms_active():
        check = _refuse_batched
        if not forward_mode and torch.is_grad_enabled() and _inside_vmap():
            _refuse_vmap()
    with ordinary_modes(device):
        yield _in_modes(problem, autocast, check)


def _in_modes(problem: P, autocast: Autocast | None, check: Check | None) -> P:
    given: Any = problem
    changes: dict[str, Any] = {}
    for name in ("u0", "tspan", "p"):
        value = getattr(given, name, None)
        tensors = [*tensors_of(value)]
        if any(x.is_inference() for x in tensors):
            changes[name] = map_tensors(Tensor.clone, value)
        if check is not None:
            for x in tensors:
                check(x)
    if isinstance(problem, EnsembleProblem):
        inner = _in_modes(problem.problem, autocast, check)
        if inner is not problem.problem:
            changes["problem"] = inner
    elif autocast is not None or check is not None:
        # Behind the wrapper it does not show what they take.
        problem.check_arguments()
        for name in _FUNCTIONS:
            function = given.__dict__.get(name)
            if function is not None and not isinstance(function, InModes):
                changes[name] = InModes(function, problem.spec.dtype, autocast, check)
    return cast(P, dataclasses.replace(given, **changes)) if changes else problem


def _refuse_batched(x: Tensor) -> None:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            _refuse_vmap()
        x = functorch.get_unwrapped(x)


def _inside_vmap() -> bool:
    interpreters = torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in interpreters)


def _refuse_vmap() -> NoReturn:
    raise RuntimeError(
        "a solve was called inside torch.vmap, but its steps depend on the values that vmap "
        "hides.\n  Use EnsembleProblem(problem, u0=..., p=...), whose members have steps of their "
        "own, or solve the batch as one u0."
    )


def uncompiled(fn: Callable[Arguments, R]) -> Callable[Arguments, R]:
    """The function, left out by `torch.compile` with all that it calls.

    `torch.compiler.disable` does the same, but loads the compiler to say so, which takes longer
    than many solves.
    """
    disabled: Callable[Arguments, R] | None = None

    @functools.wraps(fn)
    def inner(*args: Arguments.args, **kwargs: Arguments.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(fn, reason=_UNCOMPILED)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    inner._torchdynamo_disable = True  # type: ignore[attr-defined]
    inner._torchdynamo_disable_msg = _UNCOMPILED  # type: ignore[attr-defined]
    return inner
