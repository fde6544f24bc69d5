"""The modes that torch may be in where a solve is called, and what a solve makes of them.

Inference mode, autocast and a default device are for the user's field, not for the solver's own
sums: the solver leaves them, and the field is evaluated in the autocast and with the default device
that it was solved in, in the forward pass and in every replay. `torch.compile` leaves a solve out.
Transforms of `torch.func` and derivatives in forward mode go through a solve whose every operation
is recorded, and are refused elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import Problem
from pysciml_node.problems.state import map_tensors, refuse_batched, refuse_vmap, tensors_of

P = TypeVar("P", bound=Problem | EnsembleProblem)
R = TypeVar("R")
Arguments = ParamSpec("Arguments")
Check = Callable[[Tensor], None]

_UNCOMPILED = "the steps of a solve depend on values: it runs uncompiled"
_FUNCTIONS = ("f", "drift", "diffusion")


def _default_device() -> torch.device | None:
    """Where new tensors are made, or `None` on the CPU."""
    # Torch asks in Python, and at length; a default device is one of its function modes.
    if not torch._C._len_torch_function_stack():
        return None
    default = torch.get_default_device()
    return None if default.type == "cpu" else default


@dataclass(frozen=True)
class Surrounding:
    """The modes of a place in a program that matter to a field.

    Args:
        device_type: of the state; autocast is for operations there.
        autocast: what they are cast to, or `None` where it is off.
        default_device: where new tensors are made, or `None` on the CPU.
    """

    device_type: str
    autocast: torch.dtype | None
    default_device: torch.device | None

    @classmethod
    def now(cls, device: torch.device) -> Surrounding | None:
        """That of the caller, or `None` where nothing is out of the ordinary."""
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        default = _default_device()
        return None if autocast is None and default is None else cls(kind, autocast, default)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The context in which all is as it was."""
        with ExitStack() as stack:
            if self.autocast is not None:
                # No cache: a weight cast without gradients would be found by the replay.
                stack.enter_context(
                    torch.autocast(self.device_type, self.autocast, cache_enabled=False)
                )
            if self.default_device is not None:
                stack.enter_context(self.default_device)
            yield


def foreign_mode() -> str | None:
    """The name of a mode of the user's that gets to see each operation, and may change it.

    They are those of `TorchFunctionMode` and `TorchDispatchMode`; a default device is none.
    """
    if not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()):
        return None
    functions = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = *functions, *_get_current_dispatch_mode_stack()
    return next((type(x).__name__ for x in modes if not isinstance(x, DeviceContext)), None)


@dataclass(frozen=True)
class InModes:
    """A function of a problem, evaluated in the modes in which `solve` was called.

    Args:
        function: the user's.
        dtype: the state's; outputs of the autocast's precision are cast to it.
        surrounding: the modes to evaluate it in, where they are not the ordinary ones.
        check: looks at each tensor that it returns.
    """

    function: Callable[..., Any]
    dtype: torch.dtype
    surrounding: Surrounding | None
    check: Check | None

    @property
    def autocast(self) -> bool:
        """Whether it runs in low precision."""
        return self.surrounding is not None and self.surrounding.autocast is not None

    def __call__(self, *arguments: Any) -> Any:
        """The function's value, in the state's precision."""
        if self.surrounding is None:
            out = self.function(*arguments)
        else:
            with self.surrounding.entered():
                out = self.function(*arguments)
            if self.autocast:
                out = map_tensors(self._cast, out)
        if self.check is not None:
            for x in tensors_of(out):
                self.check(x)
        return out

    def _cast(self, x: Tensor) -> Tensor:
        halved = self.surrounding is not None and x.dtype == self.surrounding.autocast
        return x.to(self.dtype) if halved else x


def are_ordinary() -> bool:
    """Whether torch is in none of the modes that `ordinary_modes` leaves."""
    return not (
        torch.is_inference_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_function_stack()
    )


def ordinary_modes(device: torch.device) -> AbstractContextManager[None]:
    """No inference mode, no autocast, and the CPU as default device.

    The solver's operations, and the tensors that it keeps, must not be subject to these modes.
    Gradients stay as they are outside, where inference mode has none.
    """
    return nullcontext() if are_ordinary() else _left(device)


@contextmanager
def _left(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if _default_device() is not None:
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def with_graph(device: torch.device) -> Iterator[None]:
    """For what is made once and kept: it has its graph, whatever the modes are it is read in."""
    with ordinary_modes(device), torch.enable_grad():
        yield


def _exporting() -> bool:
    """Whether this thread is recording an export; torch's own flag is up for all of them."""
    return torch.compiler.is_exporting() and torch._C._len_torch_dispatch_stack() > 0


def refuse_recording(what: str) -> None:
    """Refuse to be part of a program that torch records from the values of an example.

    Raises:
        RuntimeError: an export or a trace is being recorded.
    """
    if torch._C._get_tracing_state() is not None or _exporting():
        raise RuntimeError(
            f"{what} cannot be exported or traced: its steps depend on the values, and a recording "
            "would repeat those of its example.\n"
            "  Export the field and the layers around the solve, and solve between them."
        )


def _outside(
    problem: Problem | EnsembleProblem, forward_mode: bool
) -> tuple[torch.device, Surrounding | None, Check | None]:
    """Where a solve was called: its device, the modes that its field needs, and what to look for.

    Raises:
        RuntimeError: a transform is active that does not go through, or an export.
    """
    device = (problem.problem if isinstance(problem, EnsembleProblem) else problem).spec.device
    refuse_recording("a solve")
    if not forward_mode and forward_ad._current_level >= 0:
        raise RuntimeError(
            "a solve was called where derivatives in forward mode are taken, and its adjoint gives "
            "those in reverse mode alone.\n  Use adjoint=DirectAdjoint()."
        )
    check = None
    if torch._C._are_functorch_transforms_active():
        check = refuse_batched
        if not forward_mode and torch.is_grad_enabled() and _inside_vmap():
            refuse_vmap()
    return device, Surrounding.now(device), check


# Asked at every solve.
_is_inference, _is_autocast = torch.is_inference_mode_enabled, torch._C._is_any_autocast_enabled
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_are_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def _has_inference(x: Any) -> bool:
    """Whether a tensor, or one in a container, was made in inference mode."""
    # Asked at every solve.
    return x.is_inference() if type(x) is Tensor else any(map(Tensor.is_inference, tensors_of(x)))


def has_inference(problem: Problem) -> bool:
    """Whether a tensor of a problem was made in inference mode."""
    u0, (t0, t1), p = problem.u0, problem.tspan, problem.p
    if _has_inference(u0) or (p is not None and _has_inference(p)):
        return True
    return not type(t0) is type(t1) is float and _has_inference((t0, t1))


def nothing_is_special(problem: Problem | EnsembleProblem) -> bool:
    """Whether a problem is solved as it is: torch is in none of these modes, as at most solves."""
    if isinstance(problem, EnsembleProblem):
        return False
    return not (
        has_inference(problem)
        or _is_inference()
        or _is_autocast()
        or _function_modes()
        or forward_ad._current_level >= 0
        or _transforms_are_active()
        or _dispatch_modes()
        or _tracing_state() is not None
    )


def solvable(problem: P, forward_mode: bool = True) -> AbstractContextManager[P]:
    """The problem as it can be solved, in ordinary modes for the duration.

    Args:
        problem: as it was given.
        forward_mode: whether derivatives in forward mode can pass through.

    Raises:
        RuntimeError: a transform is active that does not go through, or an export.
    """
    if nothing_is_special(problem):
        return nullcontext(problem)
    return _made_solvable(problem, forward_mode)


@contextmanager
def _made_solvable(problem: P, forward_mode: bool) -> Iterator[P]:
    device, surrounding, check = _outside(problem, forward_mode)
    with ordinary_modes(device):
        yield _in_modes(problem, surrounding, check)


def in_ordinary_modes(
    solve: Callable[..., R], problem: P, forward_mode: bool, *arguments: Any
) -> R:
    """What `solve` makes of a problem inside `solvable`, whose context is only made where needed.

    Args:
        solve: is given the problem as it can be solved, and the arguments.
        problem: as it was given.
        forward_mode: whether derivatives in forward mode can pass through.
        *arguments: handed on.
    """
    if nothing_is_special(problem):
        return solve(problem, *arguments)
    device, surrounding, check = _outside(problem, forward_mode)
    if surrounding is None and not torch.is_inference_mode_enabled():
        return solve(_in_modes(problem, None, check), *arguments)
    with ordinary_modes(device):
        return solve(_in_modes(problem, surrounding, check), *arguments)


def _in_modes(problem: P, surrounding: Surrounding | None, check: Check | None) -> P:
    given: Any = problem
    changes: dict[str, Any] = {}
    for name in ("u0", "tspan", "p"):
        value = getattr(given, name, None)
        tensors = tuple(tensors_of(value))
        if any(map(Tensor.is_inference, tensors)):
            changes[name] = map_tensors(Tensor.clone, value)
        if check is not None:
            for x in tensors:
                check(x)
    if isinstance(problem, EnsembleProblem):
        inner = _in_modes(problem.problem, surrounding, check)
        if inner is not problem.problem:
            changes["problem"] = inner
    elif surrounding is not None or check is not None:
        # The wrapper hides the arguments that they take.
        problem.check_arguments()
        for name in _FUNCTIONS:
            function = given.__dict__.get(name)
            if function is not None and not isinstance(function, InModes):
                changes[name] = InModes(function, problem.spec.dtype, surrounding, check)
    return cast(P, dataclasses.replace(given, **changes)) if changes else problem


def in_full_precision(problem: P, kinds: tuple[type, ...]) -> P:
    """The problem with the plain functions of some classes, which an engine runs without torch.

    Autocast does not concern them: they compute in the state's precision.

    Args:
        problem: as it is solved.
        kinds: classes of the functions.
    """
    given: Any = problem
    changes = {
        name: function.function
        for name in _FUNCTIONS
        if isinstance(function := given.__dict__.get(name), InModes)
        and isinstance(function.function, kinds)
        and function.check is None
        and (function.surrounding is None or function.surrounding.default_device is None)
    }
    return cast(P, dataclasses.replace(given, **changes)) if changes else problem


def _inside_vmap() -> bool:
    interpreters = torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters()
    return any(
        interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in interpreters
    )


_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)


def watched_by_nobody() -> bool:
    """Whether no compiler looks at the frames that run here, as far as torch says."""
    if "torch._dynamo" not in sys.modules:
        return True
    return _callback is not None and _callback() is None and not torch.compiler.is_compiling()


def uncompiled(fn: Callable[Arguments, R]) -> Callable[Arguments, R]:
    """The function, left out by `torch.compile` with all that it calls.

    `torch.compiler.disable` does the same, but loads the compiler to say so, which takes longer
    than many solves.
    """
    disabled: Callable[Arguments, R] | None = None

    @functools.wraps(fn)
    def inner(*args: Arguments.args, **kwargs: Arguments.kwargs) -> R:
        nonlocal disabled
        if watched_by_nobody():
            return fn(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(fn, reason=_UNCOMPILED)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return left_out(inner)


def left_out(fn: Callable[Arguments, R]) -> Callable[Arguments, R]:
    """Mark a function that `torch.compile` calls as it is."""
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    fn._torchdynamo_disable_msg = _UNCOMPILED  # type: ignore[attr-defined]
    return fn
