"""The vector field of all members at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.problems.state import map_tensors
from pysciml_node.replay.comparison import entry_sizes, rounding
from pysciml_node.replay.jacobians import Expectation
from pysciml_node.steps.apart import apart
from pysciml_node.steps.field import (
    FlatField,
    Watch,
    expect_untouched,
    own_value,
    without_gradients,
)
from pysciml_node.steps.memory import Evaluate, evaluations
from pysciml_node.steps.start import versions_of

_functorch = torch._C._functorch

OfMember = Callable[..., tuple[Tensor, ...]]


_TENSOR: Any = Tensor
# By which a function sees, or changes, how a tensor is differentiated.
_OF_GRAPHS = (_TENSOR.register_hook, _TENSOR.requires_grad.__get__, _TENSOR.grad_fn.__get__)


class GraphWatch(TorchFunctionMode):
    """Sees whether a function looks at the graphs of tensors, or puts hooks on them.

    Inside of `torch.vmap` tensors seem to need no gradients, and their hooks never run.

    Attributes:
        seen: whether it has.
    """

    seen = False

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_GRAPHS and _functorch.is_batchedtensor(args[0]):
            self.seen = True
        return func(*args, **(kwargs or {}))


def over_members(one: OfMember, *arguments: Any) -> tuple[Tensor, ...]:
    """Map a function over members, as `torch.vmap` does it without its checks.

    Args:
        one: of the tensors of one member.
        arguments: trees of tensors with a leading `L`, the last one a tensor.
    """
    count = arguments[-1].shape[0]
    level = _functorch._vmap_increment_nesting(count, "error")
    try:
        inside = (
            map_tensors(lambda x: _functorch._add_batch_dim(x, 0, level), x) for x in arguments
        )
        out = one(*inside)
        return tuple(_functorch._remove_batch_dim(x, level, count, 0) for x in out)
    finally:
        _functorch._vmap_decrement_nesting()


class MembersField:
    """`f` on the flat states of some members, `(L, N)`, each at a time of its own.

    The field is written for one member and mapped over them; or it takes the batch itself
    (`batched` of the ensemble).

    Args:
        ensemble: gives `f`, the structure of a state and the members' `p`.

    Attributes:
        given: holds `f` and the `p` of all members, or of the problem: during a backward sweep with
            stand-ins for tensors.
        own: whether members have parameters of their own.
        watch: is shown what evaluations without gradients would depend on.
    """

    watch: Watch | None = None

    def __init__(self, ensemble: EnsembleProblem) -> None:
        problem: Any = ensemble.problem
        self.own = ensemble.p is not None
        self.batched = ensemble.batched
        self.given: dict[str, Any] = {"f": problem.f, "p": ensemble.p if self.own else problem.p}
        if problem.jac is not None:
            self.given["jac"] = problem.jac
        self.has_jacobian = problem.jac is not None
        self.expect_jacobian = Expectation("jac", "Leave it out, or correct it.")
        self.spec, self.mass = problem.spec, problem.mass
        self._nfe = np.zeros(len(ensemble), dtype=np.int64)
        self._all = np.arange(len(ensemble))
        # Evaluations of some members that are not in the counts yet.
        self._tallied: tuple[Array, int] = (self._all, 0)
        # A batch of states, and the times beside it.
        self._flat = len(self.spec.shapes[0]) == 1
        self._shape = (-1, *self.spec.shapes[0])
        self._beside = (-1, *(1,) * len(self.spec.shapes[0]))
        # What it makes of the output of one member: checks, and the way to flat vectors.
        self._one = FlatField(problem, {})

    def parameters(self, rows: Array) -> Any:
        """The `p` of some members."""
        p = self.given["p"]
        if not self.own or np.array_equal(rows, self._all):
            return p
        index: Tensor | None = None

        def chosen(x: Tensor) -> Tensor:
            nonlocal index
            if index is None or index.device != x.device:
                index = torch.from_numpy(rows).to(x.device)
            return x.index_select(0, index)

        return map_tensors(chosen, p)

    def __call__(self, t: Tensor, u: Tensor, p: Any) -> Tensor:
        """Evaluate the derivatives, `(L, N)`; the caller counts.

        Args:
            t: times, `(L,)`.
            u: flat states, `(L, N)`.
            p: their parameters, as `parameters` gave them.
        """
        evaluate = self._batch if self.batched else self._mapped
        if torch.is_grad_enabled():
            with apart("the field", (t, u), during=self._one.during):
                return evaluate(t, u, p)
        if self.watch is None and not u.requires_grad:
            k = evaluate(t, u, p)
            return k.detach() if k.requires_grad else k
        return without_gradients(lambda t, u: evaluate(t, u, p), t, u, self.watch)

    def later(self, starts: Iterable[tuple[Array, Tensor]]) -> Iterator[Evaluate]:
        """Evaluations of all members, for `Inputs.expect_idle`.

        Args:
            starts: times `(M,)` and states `(M, N)`.
        """

        def of_all(t: Tensor, u: Tensor) -> Tensor:
            return self(t, u, self.given["p"])

        at = ((torch.from_numpy(t).to(u.device, u.dtype.to_real()), u) for t, u in starts)
        return evaluations((of_all,), at)

    @property
    def nfe(self) -> Array:
        """Evaluations for each member, `(M,)`."""
        rows, evaluations = self._tallied
        if evaluations:
            self._nfe += evaluations * np.bincount(rows, minlength=len(self._nfe))
            self._tallied = rows, 0
        return self._nfe

    def restart(self) -> None:
        """Count from the first evaluation of all members."""
        self.nfe[:] = 1

    def tally(self, rows: Array, evaluations: int = 1) -> None:
        """Count evaluations for some members, which may be named several times."""
        same, before = self._tallied
        # The same members evaluate stage after stage: their counts are added up when it is others.
        if same is not rows:
            _ = self.nfe
            before = 0
        self._tallied = rows, before + evaluations

    def _mapped(self, t: Tensor, u: Tensor, p: Any) -> Tensor:
        (out,) = self.over(lambda t, u: (self._one._evaluate(t, u),), p, t, u)
        return out

    def jacobian(self, t: Tensor, u: Tensor, p: Any) -> Tensor:
        """What the problem's `jac` gives for each, `(L, N, N)`; arguments as of a call."""
        (out,) = self.over(lambda t, u: (self._one.jacobian(t, u),), p, t, u)
        return out

    def over(self, one: OfMember, p: Any, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Map a function over members, while what it calls is given the `p` of each.

        As `torch.vmap` does it, without a walk through the arguments at each call.

        Args:
            one: of the tensors of one member.
            p: their parameters, as `parameters` gave them.
            arguments: tensors with a leading `L`.
        """

        def given(*inside: Any) -> tuple[Tensor, ...]:
            self._give({**self.given, "p": inside[0] if self.own else p})
            return one(*inside[1:])

        try:
            return over_members(given, p if self.own else None, *arguments)
        finally:
            self._give({})

    def _give(self, given: dict[str, Any]) -> None:
        """What the function that is mapped is to use."""
        self._one.given = given

    def _batch(self, t: Tensor, u: Tensor, p: Any) -> Tensor:
        """By one call of a field that takes batches."""
        f, versions = self.given["f"], versions_of([t, u])
        state = u if self._flat else u.view(self._shape)
        times = t.view(self._beside)
        out = f(times, state) if p is None else f(times, state, p)
        expect_untouched([t, u], versions, "the field")
        if not isinstance(out, Tensor):
            raise TypeError(
                f"the field must return a tensor like u0, but returned {type(out).__name__}.\n"
                "  Return the derivative of each member's state, with a leading M."
            )
        if out.shape != state.shape or out.dtype != u.dtype or out.device != u.device:
            raise ValueError(
                f"the field's output must have shape {tuple(state.shape)}, {u.dtype} on "
                f"{u.device}, but is {tuple(out.shape)}, {out.dtype} on {out.device}.\n"
                "  With batched=True it is given the states of all members that are under way."
            )
        return own_value(out if self._flat else out.reshape(u.shape))


def differing(field: MembersField, alone: Callable[[int], Tensor], k: Tensor) -> int | None:
    """A member for which the field by itself gives something else than in the batch, if any.

    The first and the last are looked at.

    Args:
        field: as evaluated in the batch.
        alone: gives the derivative of a member by itself.
        k: the derivatives of all members at their starts, `(M, N)`.
    """
    bound = rounding(field.spec.real_dtype)
    for m in {0, len(k) - 1}:
        with torch.no_grad():
            expected = alone(m)
        batched = k[m].detach()
        same = (batched - expected).abs() <= bound * entry_sizes(expected, batched)
        if not bool((same | (batched.isnan() & expected.isnan()) | (batched == expected)).all()):
            return m
    return None
