"""The base of modules that hold a differential equation."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import TypeVar

from pysciml_node.algorithms.adjoints import DirectAdjoint
from pysciml_node.algorithms.explicit import Algorithm, Tsit5
from pysciml_node.checks import choice, function
from pysciml_node.errors import PsnWarning
from pysciml_node.layers.autonomous import unregistered, used, with_time
from pysciml_node.layers.options import SolverOptions, check_options
from pysciml_node.problems.modes import ordinary_modes, solvable
from pysciml_node.problems.ode import Problem, Time, check_span
from pysciml_node.regularizers.base import Regularizer, attach_penalties, check_names
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving.checks import chosen
from pysciml_node.solving.solve import solve

Out = TypeVar("Out", default=Solution)
Output = Literal["solution", "u1"]
SolveHook = Callable[[Any, Any], None]
P = TypeVar("P", bound=Problem)


class NeuralDE(nn.Module, Generic[Out]):
    """Base of the modules that solve an equation from their input over a fixed interval.

    Args:
        algorithm: how; `None` leaves the choice to `solve`.
        tspan: the interval.
        output: what a call returns: the `"solution"`, or its end state `"u1"`.
        options: see `SolverOptions`.

    Attributes:
        last: where the end state is returned, the solution of the last call; else `None`.
        penalty: its penalty; reading it raises an `AttributeError` where the layer has none.

    Raises:
        TypeError: an unknown option, an algorithm, an adjoint or a regularizer of another kind, an
            interval that is no pair.
        ValueError: two regularizers of one name.
    """

    penalty: Tensor
    usual_tolerance: ClassVar[float] = 1e-6
    fields: ClassVar[tuple[str, ...]] = ("field",)
    _looked = False  # whether there are parameters that are not registered

    def __init__(
        self,
        algorithm: Algorithm | None,
        tspan: tuple[Time, Time],
        output: Output,
        options: SolverOptions,
    ) -> None:
        super().__init__()
        check_options(type(self), options)
        self.output = choice("output", output, get_args(Output))
        self.last: Solution | EnsembleSolution | None = None
        self._functions: dict[str, tuple[Any, Callable[..., Any]]] = {}
        self._solve_hooks: OrderedDict[int, SolveHook] = OrderedDict()
        if algorithm is not None:
            chosen("algorithm", algorithm, Algorithm, Tsit5)
        self.algorithm = algorithm
        check_span(tspan)
        self.tspan = tspan
        remaining: dict[str, Any] = dict(options)
        self.rtol = remaining.pop("rtol", self.usual_tolerance)
        self.atol = remaining.pop("atol", self.usual_tolerance)
        self.regularizers = nn.ModuleList(check_names(remaining.pop("regularizers", ())))
        self.adjoint = remaining.pop("adjoint", None)
        self.saveat = remaining.pop("saveat", None)
        self.engine = remaining.pop("engine", None)
        self.options = remaining
        self.regularize = True

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Out:
            """Call `forward`."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The layer's parameters; warns, once, of those of its field that are not registered."""
        parameters = list(super().parameters(recurse))
        hidden = (
            [] if parameters else [m for name in self.fields for m in used(getattr(self, name))]
        )
        if hidden:
            kinds = ", ".join(sorted({type(m).__name__ for m in hidden}))
            warnings.warn(
                f"this {type(self).__name__} has no parameters: its field is a function, which "
                f"uses those of {kinds} but does not own them.\n"
                "  Write the field as an nn.Module, or give its modules' parameters to the "
                "optimizer.",
                PsnWarning,
                stacklevel=2,
            )
        if not self._looked:
            self._looked = True
            lost = ", ".join(name for held in self.children() for name in unregistered(held))
            if lost:
                warnings.warn(
                    f"this {type(self).__name__}'s parameters() lack those in {lost}, which its "
                    "field has not registered.\n"
                    "  Hold modules in an nn.ModuleList or nn.ModuleDict, and tensors as "
                    "nn.Parameter.",
                    PsnWarning,
                    stacklevel=2,
                )
        return iter(parameters)

    def give(self, solution: Solution | EnsembleSolution) -> Any:
        """The part of a solution that a call returns."""
        if self.output == "solution":
            return solution
        self.last = solution
        return solution.u1

    def __getattr__(self, name: str) -> Any:
        if name == "penalty":
            last = self.__dict__.get("last")
            if last is not None:
                return last.penalty
            raise AttributeError(
                "the layer keeps no penalty: it has not been called, or returns solutions.\n"
                '  Read solution.penalty, or make the layer with output="u1" and call it.'
            )
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has not been called, and nobody watches it.
        return {**self.__dict__, "last": None, "_solve_hooks": OrderedDict()}

    def function(self, name: str) -> Callable[..., Any]:
        """The field of this name as a function of time and state."""
        # Modules are found where they lie: torch looks for them when all else has failed.
        module = self._modules.get(name)
        given = getattr(self, name) if module is None else module
        known = self._functions.get(name)
        # One function for one field: an engine may know it again.
        if known is None or known[0] is not given:
            known = self._functions[name] = given, with_time(given)
        return known[1]

    def ready(self, problem: P) -> AbstractContextManager[P]:
        """The problem as it can be solved, in ordinary modes for the duration."""
        return solvable(problem, isinstance(self.adjoint, DirectAdjoint))

    def active_regularizers(self) -> list[Regularizer]:
        """The regularizers that count now: all in training mode, none in eval mode."""
        if not (self.training and self.regularize):
            return []
        return list(cast(Iterable[Regularizer], self._modules["regularizers"]))

    def settings(self, **arguments: Any) -> dict[str, Any]:
        """The module's options of a solve, which `arguments` can replace."""
        return {
            "rtol": self.rtol,
            "atol": self.atol,
            "saveat": self.saveat,
            "engine": self.engine,
            "adjoint": self.adjoint,
            **self.options,
            **arguments,
        }

    def solve(self, problem: Problem, **arguments: Any) -> Solution:
        """Solve a problem with the module's settings, which `arguments` can replace."""
        return solve(problem, self.algorithm, **self.settings(**arguments))

    def penalize(self, solution: Solution, regularizers: Sequence[Regularizer]) -> Solution:
        """Set a solution's penalties, and show it to the hooks; returns it."""
        if not solution._is_later("penalty"):  # which is then the same zero
            spec = solution.problem.spec
            with ordinary_modes(spec.device):
                solution.penalty = torch.zeros((), dtype=spec.real_dtype, device=spec.device)
        if regularizers:
            attach_penalties(solution, regularizers)
        self.show(solution)
        return solution

    def register_solve_hook(self, hook: SolveHook) -> RemovableHandle:
        """Have `hook(layer, solution)` called after every solve, also inside flows and models.

        The solution has its penalties then, and in eval mode none. Copies of the layer, and what
        is pickled of it, have no hooks.

        Args:
            hook: reads the solution; what it returns is ignored.

        Returns:
            What takes the hook off again, by its `remove()`.

        Raises:
            TypeError: a hook that does not take layer and solution.

        Examples:
            >>> import torch, pysciml_node as psn
            >>> node = psn.NeuralODE(torch.nn.Linear(2, 2))
            >>> counts = []
            >>> handle = node.register_solve_hook(lambda layer, sol: counts.append(sol.stats.nfe))
            >>> solution = node(torch.zeros(1, 2))
            >>> counts == [solution.stats.nfe]
            True
            >>> handle.remove()
        """
        handle = RemovableHandle(self._solve_hooks)
        self._solve_hooks[handle.id] = function("hook", hook, "layer", "solution")
        return handle

    def show(self, solution: Solution | EnsembleSolution) -> None:
        """Show a solution to the hooks."""
        if self._solve_hooks:
            for hook in list(self._solve_hooks.values()):
                hook(self, solution)

    def step_schedules(self) -> None:
        """Count one training step of every regularizer's weight schedule."""
        for regularizer in self.regularizers:
            regularizer.step()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"{self.algorithm}, tspan={self.tspan}, rtol={self.rtol}, atol={self.atol}"


@contextmanager
def without_regularizers(module: nn.Module) -> Iterator[None]:
    """Solve the equations inside a module as in eval mode where it comes to regularizers."""
    layers = [inner for inner in module.modules() if isinstance(inner, NeuralDE)]
    before = [layer.regularize for layer in layers]
    try:
        for layer in layers:
            layer.regularize = False
        yield
    finally:
        for layer, regularize in zip(layers, before, strict=True):
            layer.regularize = regularize
