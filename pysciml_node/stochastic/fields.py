"""The drift and the diffusion as counted functions of flat states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.problems.sde import SDEProblem
from pysciml_node.steps.alone import own
from pysciml_node.steps.apart import apart
from pysciml_node.steps.cotangents import BackwardPass
from pysciml_node.steps.field import (
    FlatField,
    expect_copies,
    expect_untouched,
    inputs_of,
    own_value,
    without_gradients,
)
from pysciml_node.steps.first_graph import FirstGraph
from pysciml_node.steps.memory import Evaluate, evaluations
from pysciml_node.steps.start import versions_of
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.steps.words import FOREIGN, say_what_was_given


def _given(problem: SDEProblem) -> dict[str, Any]:
    return {"f": problem.drift, "diffusion": problem.diffusion, "p": problem.p}


class NoiseLayout:
    """How the Brownian motions of a problem act on its flat state.

    Args:
        samples: systems with motions of their own.
        motions: motions of each; `None` where every entry of the state has its own.
        entries: entries of the flat state.
        matrix: the diffusion has one more axis than the state, over the motions.
    """

    def __init__(self, samples: int, motions: int | None, entries: int, matrix: bool) -> None:
        self.samples, self.motions, self.entries, self.matrix = samples, motions, entries, matrix
        self.size = entries if motions is None else samples * motions

    @classmethod
    def of(cls, problem: SDEProblem, fields: Fields) -> NoiseLayout:
        """The layout of a problem, from one value of its diffusion where that has to be seen.

        Raises:
            TypeError: the diffusion returns no tensor.
            ValueError: the diffusion has another shape than the noise asks for.
        """
        if problem.noise in ("diagonal", "scalar"):
            return cls.seen(problem, None)
        with torch.no_grad():
            value = fields.raw_diffusion(problem.time_tensor([problem.t0])[0], problem.u0)
        return cls.seen(problem, value)

    @classmethod
    def seen(cls, problem: SDEProblem, value: Any) -> NoiseLayout:
        """The layout of a problem whose diffusion has returned a value.

        Args:
            problem: the problem.
            value: what it was; not looked at for diagonal and scalar noise.
        """
        entries, shape = sum(problem.spec.sizes), problem.spec.shapes[0]
        if problem.noise == "diagonal":
            return cls(entries, None, entries, matrix=False)
        if problem.noise == "scalar":
            return cls(problem.samples, 1, entries, matrix=False)
        returned = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if problem.noise == "additive" and (problem.spec.keys is not None or returned == shape):
            return cls(entries, None, entries, matrix=False)
        shaped = isinstance(value, Tensor) and value.ndim and value.shape[:-1] == shape
        if not shaped or not value.shape[-1]:
            wanted = f"({', '.join(str(n) for n in (*shape, 'm'))})"
            also = f"{tuple(shape)} or " if problem.noise == "additive" else ""
            raise ValueError(
                f"the diffusion must have shape {also}{wanted} for {problem.noise} noise, but "
                f"returned {returned}.\n  The last axis is over one or more Brownian motions, m."
            )
        return cls(problem.samples, value.shape[-1], entries, matrix=True)

    def shape_of(self, state: torch.Size) -> torch.Size:
        """The shape of the diffusion of a state."""
        return torch.Size((*state, self.motions or 0)) if self.matrix else state

    def apply(self, g: Tensor, integral: Tensor | float) -> Tensor:
        """The diffusion times an integral of each motion; flat, `(N,)`."""
        if isinstance(integral, float) or not integral.ndim:
            return g * integral
        if self.matrix:
            columns = integral.view(self.samples, -1)
            rows = g.view(self.samples, -1, columns.shape[1])
            return torch.bmm(rows, columns.unsqueeze(-1)).view(-1)
        return g * self.by_entry(integral)

    def add(self, base: Tensor, g: Tensor, integral: Tensor | float, weight: float = 1.0) -> Tensor:
        """`base`, `(N,)`, with the diffusion times an integral of each motion and a weight."""
        if isinstance(integral, float):
            return torch.add(base, g, alpha=weight * integral)
        if self.matrix or not integral.ndim:
            return torch.add(base, self.apply(g, integral), alpha=weight)
        return torch.addcmul(base, g, self.by_entry(integral), value=weight)

    def by_entry(self, integral: Tensor) -> Tensor:
        """An integral of each motion, repeated for every entry that it drives alone, `(N,)`.

        Matrices of diffusions mix the motions: for them it is returned as it is.
        """
        if self.motions is None or self.matrix:
            return integral
        return integral.unsqueeze(-1).expand(-1, self.entries // self.samples).reshape(-1)

    def magnitude(self, g: Tensor) -> Tensor:
        """Standard deviation of `g dW / dt**0.5` for each entry, `(N,)`."""
        return g.view(self.entries, -1).norm(dim=-1) if self.matrix else g.abs()

    def shaped(self, w: Tensor, problem: SDEProblem) -> Any:
        """Motions in a form to read: the state's, `(B,)` for scalar, `(B, m)` for others.

        Without the `B` for a single system.
        """
        if self.motions is None:
            return problem.spec.unflatten(w)
        lead = (self.samples,) if len(problem.spec.shapes[0]) >= 2 else ()
        return w.view((*lead, self.motions) if self.matrix else lead)


class _Drift(FlatField):
    """The drift. A step keeps its values while it evaluates others."""

    @override
    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return own(super().__call__(t, u))


class Fields:
    """Drift and diffusion on flat states, with their evaluations counted.

    Args:
        problem: gives both, the state's structure and `p`.
        given: holds the functions and `p` instead, where another is to change them.

    Attributes:
        given: holds `f` (the drift), `diffusion` and `p`.
    """

    def __init__(self, problem: SDEProblem, given: dict[str, Any] | None = None) -> None:
        self.given = _given(problem) if given is None else given
        self.drift: FlatField = _Drift(problem, self.given)
        self.problem = problem
        self.spec = problem.spec
        self.nfe_diffusion = 0
        self.layout = NoiseLayout.of(problem, self)

    def of(self, problem: SDEProblem) -> Fields:
        """Those of a problem that differs in values alone; the layout need not be looked for."""
        fields = copy.copy(self)
        fields.given = _given(problem)
        fields.drift = _Drift(problem, fields.given)
        fields.problem, fields.spec = problem, problem.spec
        return fields

    @property
    def nfe(self) -> int:
        """Evaluations of the drift so far."""
        return self.drift.nfe

    def raw_diffusion(self, t: Tensor, state: Any) -> Any:
        """The diffusion as it is given."""
        self.nfe_diffusion += 1
        g, p = self.given["diffusion"], self.given["p"]
        return g(t, state) if p is None else g(t, state, p)

    def diffusion(self, t: Tensor, u: Tensor) -> Tensor:
        """The diffusion; flat, `(N,)` or `(N * m,)`."""
        if torch.is_grad_enabled():
            with apart("the diffusion", (t, u), during=self.drift.during):
                return own(self._diffusion(t, u))
        return own(without_gradients(self._diffusion, t, u, self.drift.watch))

    def _diffusion(self, t: Tensor, u: Tensor) -> Tensor:
        versions = versions_of([t, u])
        state = self.spec.unflatten(u)
        try:
            out = self.raw_diffusion(t, state)
        except FOREIGN as error:
            expect_copies(error, "the diffusion")
            say_what_was_given(error, "the diffusion", t, state)
            raise
        expect_untouched([t, u], versions, "the diffusion")
        if self.spec.keys is not None:
            if not self.spec.matches(out):
                raise TypeError(
                    f"the diffusion must return the structure of u0, but returned "
                    f"{type(out).__name__}.\n  Return a diffusion for each part of the state."
                )
            pieces = zip(self.spec.parts(out), self.spec.shapes, strict=True)
            return torch.cat([self._checked(part, shape).reshape(-1) for part, shape in pieces])
        shape = self.layout.shape_of(self.spec.shapes[0])
        return own_value(self._checked(out, shape).reshape(-1))

    def _checked(self, out: Any, shape: torch.Size) -> Tensor:
        spec = self.spec
        if not isinstance(out, Tensor):
            raise TypeError(
                f"the diffusion must return tensors, but returned {type(out).__name__}.\n"
                "  A constant c is c * torch.ones_like(u)."
            )
        expect_shape(self.problem, out.shape, shape)
        if out.dtype != spec.dtype or out.device != spec.device:
            raise TypeError(
                f"the diffusion must be {spec.dtype} on {spec.device} like u0, but is {out.dtype} "
                f"on {out.device}.\n  Convert its parameters: module.to(u0)."
            )
        return out


def expect_shape(problem: SDEProblem, found: torch.Size, wanted: torch.Size) -> None:
    """Check the shape of a diffusion.

    Raises:
        ValueError: it is another one.
    """
    if found != wanted:
        raise ValueError(
            f"the diffusion must have shape {tuple(wanted)} for {problem.noise} noise, but "
            f"has {tuple(found)}.\n  A constant c is c * torch.ones_like(u)."
        )


class DifferentiableFields:
    """Drift and diffusion prepared for gradients: their inputs found.

    Args:
        problem: gives both.
        u0: the state at the start, `(N,)`.
        graph: where it is given, that of the evaluation there is kept and measured.

    Attributes:
        fields: both.
        surroundings: what they can reach.
        captured: the tensors outside that receive gradients.
        first: drift and diffusion at `(t0, u0)`, from the evaluation that looked for them.
    """

    def __init__(self, problem: SDEProblem, u0: Tensor, graph: FirstGraph | None = None) -> None:
        self.fields = fields = Fields(problem)
        self.surroundings = Surroundings(fields.given)
        self._start = time = problem.time_tensor([problem.t0])[0]
        if self.surroundings.lazy:
            with torch.no_grad():
                fields.drift(time, u0)
                fields.diffusion(time, u0)
            self.surroundings = Surroundings(fields.given)

        self.captured = inputs_of(
            lambda u: (fields.drift(time, u), fields.diffusion(time, u)),
            self.surroundings,
            u0,
            problem.p,
            graph,
        )
        drift, diffusion = self.captured.first
        self.first = drift, diffusion

    def later(self, backward: BackwardPass) -> Iterator[Evaluate]:
        """Evaluations where some steps of a solve begin, for `Inputs.expect_idle`."""
        # A method may carry more than the state.
        size, starts = sum(self.fields.spec.sizes), backward.later_starts()
        places = ((self._start.new_full((), t), vector[:size]) for t, vector in starts)
        return evaluations((self.fields.drift, self.fields.diffusion), places)

    @property
    def inputs(self) -> list[Tensor]:
        """The outer tensors that receive gradients, in the order of `leaves`."""
        return self.captured.inputs

    @property
    def leaves(self) -> list[Tensor]:
        """What stands for them inside."""
        return self.captured.leaves
