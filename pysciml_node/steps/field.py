"""The user's vector field as a counted function of flat states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.alone import own, own_whole
from pysciml_node.steps.apart import During, Lookout, WentBack, apart
from pysciml_node.steps.cotangents import BackwardPass
from pysciml_node.steps.first_graph import Evaluation, FirstGraph
from pysciml_node.steps.graph import Grad, nodes_made, nodes_since, pull_back
from pysciml_node.steps.inputs import Inputs
from pysciml_node.steps.memory import Evaluate, evaluations
from pysciml_node.steps.randomness import expect_repeatable
from pysciml_node.steps.start import versions_of
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.steps.usual import Usual
from pysciml_node.steps.words import FOREIGN, say_what_was_given

Watch = Callable[[Tensor], None]


def without_gradients(
    evaluate: Callable[[Tensor, Tensor], Tensor], t: Tensor, u: Tensor, watch: Watch | None
) -> Tensor:
    """A value that does not need gradients, of a state that does not.

    A view made without gradients may claim to require them and yet lead nowhere, which a field that
    differentiates something itself would meet.
    """
    if u.requires_grad:
        u = u.detach()
    if watch is None:
        value = evaluate(t, u)
    else:
        with torch.enable_grad():
            value = evaluate(t, u)
        watch(value)
    return value.detach() if value.requires_grad else value


def expect_untouched(given: list[Tensor], versions: list[int | None], what: str) -> None:
    """Check that a function has left what it was given as it was.

    Args:
        given: time and state.
        versions: their `versions_of` before the call.
        what: the function, in messages.

    Raises:
        RuntimeError: it has changed one.
    """
    if versions != versions_of(given):
        refuse_touched(what)


def refuse_touched(what: str) -> NoReturn:
    """Say that a function has changed what it was given.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"{what} has changed its input in place, which is the solver's own.\n"
        "  Work on a copy, for example u.neg() instead of u.neg_()."
    )


def expect_copies(error: Exception, what: str) -> None:
    """Say what torch has refused, where a function changes what gradients are asked of.

    Args:
        error: what the function has raised.
        what: the function, in messages.

    Raises:
        RuntimeError: it changes its input, or a parameter, in place.
    """
    if "leaf Variable that requires grad is being used in an in-place operation" in str(error):
        raise RuntimeError(
            f"{what} has changed in place its input, which is the solver's own, or a parameter.\n"
            "  Work on a copy, for example u.neg() instead of u.neg_()."
        ) from error


def own_value(value: Tensor) -> Tensor:
    """A value apart from what was written in place, which may be a buffer that is used again."""
    return value if value.is_inference() or not value._version else value.clone()


class FlatField:
    """`f` on flat states `(N,)`, with its evaluations counted and its output checked.

    Without gradients it neither takes nor gives tensors that need them, whatever `f` does inside.
    With them, as values are kept, it gives none that `f` writes to later.

    Args:
        problem: gives `f` (the drift of a stochastic one), the state's structure and `p`.
        given: holds `f` and `p` instead, where another is to change them.

    Attributes:
        given: holds `f` and `p`: during a backward sweep, stand-ins for the tensors of `p`.
        watch: is shown what evaluations without gradients would depend on.
        plain: whether it takes no derivatives inside, as far as is known: see `are_plain`.
        during: for what else is evaluated with it.
    """

    watch: Watch | None = None
    plain = False

    def __init__(
        self, problem: ODEProblem | SDEProblem, given: dict[str, Any] | None = None
    ) -> None:
        self.given = {"f": problem.f, "p": problem.p} if given is None else given
        if problem.jac is not None:
            self.given.setdefault("jac", problem.jac)
        self.sparsity = problem.jac_sparsity
        self.spec: StateSpec = problem.spec
        self.mass = problem.mass
        self.nfe = 0
        self._lookout, self.during = Lookout(), During()

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative; shape `(N,)`."""
        self.nfe += 1
        if torch.is_grad_enabled():
            return self._recorded(self._owned, t, u)
        if self.watch is not None or u.requires_grad:
            return without_gradients(self._evaluate, t, u, self.watch)
        value = self._evaluate(t, u)
        return value.detach() if value.requires_grad else value

    @property
    def keeps_shape(self) -> bool:
        """Whether `shaped` may be evaluated: nothing is done with the state that a view is for."""
        return self.plain and self.spec.keys is None and len(self.spec.shapes[0]) > 0

    def shaped(self, t: Tensor, u: Tensor) -> Tensor:
        """The same with a graph, of a state in the field's own shape, and in that shape.

        A graph has two nodes fewer than with views, forward and backward.

        Args:
            t: a tensor that was made for the solve.
            u: likewise; it requires gradients.
        """
        self.nfe += 1
        return self._recorded(self._shaped, t, u)

    def _recorded(
        self, evaluate: Callable[[Tensor, Tensor], Tensor], t: Tensor, u: Tensor
    ) -> Tensor:
        if self.plain:
            try:
                return self._lookout(evaluate, t, u)
            except WentBack:  # code that is in no place that was found
                self.plain = False
        with apart("the field", (t, u), during=self.during):
            return evaluate(t, u)

    def settle(self) -> None:
        """Called when the solve has run: what a derivative inside would come to is let go."""
        self._lookout.let_go()

    def _owned(self, t: Tensor, u: Tensor) -> Tensor:
        return own(self._evaluate(t, u))

    def _shaped(self, t: Tensor, u: Tensor) -> Tensor:
        value = self._call(t, u)
        if t._version or u._version or not u.requires_grad:  # they were new, and the state did
            refuse_touched("the field")
        value = self._single(value)
        return own_whole(value)

    def _evaluate(self, t: Tensor, u: Tensor) -> Tensor:
        spec = self.spec
        before, state = versions_of((t, u)), spec.unflatten(u)
        out = self._call(t, state)
        if versions_of((t, u)) != before:
            refuse_touched("the field")
        if spec.keys is None:
            return own_value(self._single(out).reshape(-1))
        return torch.cat([part.reshape(-1) for part in self._checked(out)])

    def _call(self, t: Tensor, state: Any) -> Any:
        """What the field returns."""
        given = self.given
        f, p = given["f"], given["p"]
        try:
            return f(t, state) if p is None else f(t, state, p)
        except FOREIGN as error:
            expect_copies(error, "the field")
            say_what_was_given(error, "the field", t, state)
            raise

    def _single(self, out: Any) -> Tensor:
        """An output for a state that is one tensor."""
        spec = self.spec
        if (
            type(out) is not Tensor
            or out.shape != spec.shapes[0]
            or out.dtype != spec.dtype
            or out.device != spec.device
        ):
            return self._checked(out)[0]
        return out

    def jacobian(self, t: Tensor, u: Tensor) -> Tensor:
        """What the problem's `jac` gives, `(N, N)`, without gradients."""
        jac, p = self.given["jac"], self.given["p"]
        with torch.no_grad():
            state = self.spec.unflatten(u.detach())
            matrix = jac(t, state) if p is None else jac(t, state, p)
        size = u.numel()
        kind = matrix.dtype if isinstance(matrix, Tensor) else None
        if kind != u.dtype or matrix.shape != (size, size):
            raise ValueError(
                f"jac must return a {u.dtype} tensor of shape {(size, size)}, a row for each entry "
                f"of f's flat output, but returned {checks.shown(matrix)}.\n"
                "  Reshape it: jacobian.reshape(N, N), N being the number of entries of the state."
            )
        given: Tensor = matrix.detach()
        return given

    @property
    def has_jacobian(self) -> bool:
        """Whether the problem brings its own Jacobian."""
        return "jac" in self.given

    def _checked(self, out: Any) -> list[Tensor]:
        """The parts of an output, or an error that says what is wrong with it."""
        spec = self.spec
        expected = {None: "a tensor", int: "a tuple", str: "a dict"}[
            None if spec.keys is None else (int if isinstance(spec.keys[0], int) else str)
        ]
        if not spec.matches(out) or (spec.keys is None and not isinstance(out, Tensor)):
            hint = "Return the derivative of each part of the state, in the same structure."
            if out is None:
                hint = "Return the derivative: the function ends without a return."
            elif spec.keys is None and isinstance(out, tuple | list):
                hint = "Return its entries as one tensor: torch.stack([...])."
            elif spec.keys is None and isinstance(out, int | float):
                hint = "Return one entry for each of u: torch.full_like(u, 1.0)."
            elif isinstance(out, np.ndarray):
                hint = "Compute with torch: gradients do not go through NumPy."
            raise TypeError(
                f"the field must return {expected} like u0, but returned {type(out).__name__}"
                + (f" of {len(out)}" if isinstance(out, tuple | list | dict) else "")
                + f".\n  {hint}"
            )
        parts = list(spec.parts(out))
        for key, part, shape in zip(spec.keys or ("",), parts, spec.shapes, strict=True):
            name = "the field's output" if spec.keys is None else f"the field's output[{key!r}]"
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"{name} must be a tensor, but is {type(part).__name__}.\n"
                    "  Return du/dt as tensors: numbers become some by torch.as_tensor."
                )
            if part.shape != shape:
                raise ValueError(
                    f"{name} must have the state's shape {tuple(shape)}, but has "
                    f"{tuple(part.shape)}.\n  f(t, u) returns du/dt, one entry for each of u."
                )
            if part.device != spec.device:
                raise ValueError(
                    f"{name} must be on {spec.device}, but is on {part.device}.\n"
                    "  Move the field's parameters (module.to(u0.device)) or u0."
                )
            if part.dtype != spec.dtype:
                raise TypeError(
                    f"{name} must have the state's dtype {spec.dtype}, but has {part.dtype}.\n"
                    "  Convert the field's parameters (module.to(u0.dtype)) or u0."
                )
        return parts


def inputs_of(
    evaluate: Callable[[Tensor], tuple[Tensor, ...]],
    surroundings: Surroundings,
    u0: Tensor,
    p: Any,
    graph: FirstGraph | None,
) -> Inputs:
    """What receives gradients, by one evaluation at the start.

    Args:
        evaluate: the values at a state.
        surroundings: what they can reach.
        u0: the state at the start, `(N,)`.
        p: the extra argument.
        graph: where it is given, that of the evaluation is kept and measured.
    """
    kept = graph

    def first() -> Evaluation:
        if kept is not None and not kept.refused and u0.requires_grad:
            try:
                return counted(u0)
            except WentBack:
                kept.refused = True
        return counted(u0.detach().requires_grad_())

    def counted(start: Tensor) -> Evaluation:
        before = nodes_made()
        values = evaluate(start)
        if kept is not None:
            kept.made = nodes_since(before)
        return values, (start,)

    checked = expect_repeatable(surroundings, u0.device, first, "its backward pass")
    with Grad(True):
        inputs = Inputs(surroundings, checked, p, graph)
    kept = None  # later evaluations are apart from it
    return inputs


class DifferentiableField:
    """A field prepared for gradients: its inputs found, its vector-Jacobian product at hand.

    Attributes:
        field: the field itself.
        surroundings: what it can reach.
        captured: the tensors outside that receive gradients.
        evaluate: evaluates it in a graph that is kept: a state that has the shape of its start.
        k0: the derivative at `(t0, u0)`, from the evaluation that looked for them.

    Args:
        problem: gives the field.
        t0: start.
        u0: the state there, `(N,)`.
        graph: where it is given, that of the evaluation is kept and measured.
        start: the state before it was made flat, where that is one tensor, none that others have.
    """

    def __init__(
        self,
        problem: ODEProblem,
        t0: Tensor,
        u0: Tensor,
        graph: FirstGraph | None = None,
        start: Tensor | None = None,
    ) -> None:
        self.field = field = FlatField(problem)
        self.surroundings = Surroundings(field.given)
        if self.surroundings.lazy:
            with torch.no_grad():
                field(t0, u0)
            self.surroundings = Surroundings(field.given)
        field.plain = self.surroundings.plain

        # A time without a gradient may be a number in NumPy or `math`, as in every later step.
        self._start = t = t0.detach()
        self.evaluate = field.__call__
        if graph is not None and start is not None and field.keeps_shape:
            self.evaluate, u0 = field.shaped, start
        evaluate = self.evaluate
        self.captured = inputs_of(
            lambda u: (evaluate(t, u),), self.surroundings, u0, problem.p, graph
        )
        self.k0 = self.captured.first[0].reshape(-1)

    @classmethod
    def of_usual(
        cls, field: FlatField, surroundings: Surroundings, usual: Usual, t0: Tensor
    ) -> DifferentiableField:
        """One that has been evaluated already: see `Inputs.of_usual`."""
        made = cls.__new__(cls)
        made.field, made.surroundings, made._start = field, surroundings, t0
        made.captured = Inputs.of_usual(surroundings, usual)
        return made

    def settle(self) -> None:
        """Called when the solve has run: see `Inputs.settle`."""
        self.field.settle()
        self.captured.settle()
        self.surroundings.plain &= self.field.plain

    def later(self, backward: BackwardPass) -> Iterator[Evaluate]:
        """Evaluations where some steps of a solve begin, for `Inputs.expect_idle`."""
        starts = backward.later_starts()
        return evaluations((self.field,), ((self._start.new_full((), t), u) for t, u in starts))

    @property
    def nfe(self) -> int:
        """Evaluations of the field so far."""
        return self.field.nfe

    @property
    def inputs(self) -> list[Tensor]:
        """The outer tensors that receive gradients, in the order of `leaves`."""
        return self.captured.inputs

    @property
    def leaves(self) -> list[Tensor]:
        """What stands for them inside the field."""
        return self.captured.leaves

    def linearize(self, t: Tensor, u: Tensor, time_gradient: bool = False) -> Linearized:
        """Evaluate at `(t, u)`, keeping the graph for one vector-Jacobian product."""
        with torch.enable_grad():
            state = u.detach().requires_grad_()
            time = t.detach().requires_grad_() if time_gradient else t
            k = self.field(time, state)
        self.captured.expect_known(k, state, time)
        return Linearized(k, state, time if time_gradient else None, self.leaves)


class Linearized:
    """One evaluation of the field with its graph."""

    __slots__ = ("_k", "_leaves", "_state", "_time", "value")

    def __init__(self, k: Tensor, state: Tensor, time: Tensor | None, leaves: list[Tensor]) -> None:
        self._k, self._state, self._time, self._leaves = k, state, time, leaves
        self.value = k.detach()

    def vjp(
        self, cotangent: Tensor, with_state: bool = True, with_leaves: bool = True
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Pull a cotangent `(N,)` back to the state, the time and the field's inputs.

        An entry is `None` where the field does not depend on that input.
        """
        wanted: list[Tensor] = []
        if with_state:
            wanted.append(self._state)
        if self._time is not None:
            wanted.append(self._time)
        if with_leaves:
            wanted.extend(self._leaves)
        gradients = pull_back(self._k, wanted, cotangent)
        state = gradients.pop(0) if with_state else None
        time = gradients.pop(0) if self._time is not None else None
        return state, time, gradients if with_leaves else [None] * len(self._leaves)


class Accumulator:
    """Running sums of the gradients of the field's inputs."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self.sums: list[Tensor | None] = [None] * len(leaves)

    def add(self, gradients: list[Tensor | None], scale: float | None = None) -> None:
        """Add one set of gradients, each multiplied by `scale`."""
        totals: list[Tensor] = []
        terms: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self.sums[i]
            if total is None:
                # Autograd may hand out one tensor twice: copy before adding in place.
                self.sums[i] = gradient.clone() if scale is None else gradient * scale
            else:
                totals.append(total)
                terms.append(gradient)
        if totals:
            torch._foreach_add_(totals, terms, alpha=1.0 if scale is None else scale)
