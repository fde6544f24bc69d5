"""Adjoints: how gradients pass through a solve. The names are SciML's.

| adjoint | gradient of | memory | use it for |
|---|---|---|---|
| `DiscreteAdjoint` | the discretised solution, exactly | one state a step | the default |
| `DirectAdjoint` | the discretised solution, exactly | every stage's graph | double backward |
| `InterpolatingAdjoint` | the continuous equation | one state a step | long solves |
| `GaussAdjoint` | the continuous equation | one state a step | many parameters |
| `BacksolveAdjoint` | the continuous equation | one state a step | comparison with other packages |
| `QuadratureAdjoint` | the continuous equation | one state a step | stiff problems (Julia engine) |
| `ForwardDiffSensitivity` | the discretised solution | no tape | few parameters (Julia engine) |

`DiscreteAdjoint` keeps graphs of steps too, up to a number of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pysciml_node import checks


class Adjoint(checks.Configured):
    """Base of all adjoints."""

    discrete: bool = False


@dataclass(frozen=True)
class DirectAdjoint(Adjoint):
    """Automatic differentiation through every operation of the solver.

    It keeps the whole graph, and therefore allows double backward and forward mode.
    """

    discrete = True


@dataclass(frozen=True)
class DiscreteAdjoint(Adjoint):
    """Pulls cotangents back through the accepted steps, one at a time.

    The forward solve keeps the time, size and starting state of each accepted step, and up to
    `memory` bytes of the graphs of their stages. The backward sweep recomputes the stages of a step
    whose graphs were not kept, and pulls the cotangent through them. The gradient is exact for the
    discretised solution at frozen step sizes. As in all such methods, the derivative of the step
    sizes themselves is dropped.

    Args:
        memory: bytes that graphs of stages may take, of explicit and of stochastic steps of the
            torch engine, or in native code the values of stages; about as many of the first steps
            are kept. With 0 every step is recomputed.
    """

    memory: int = 2**26
    discrete = True

    def __post_init__(self) -> None:
        checks.settle(self, memory=checks.whole("DiscreteAdjoint: memory", self.memory, at_least=0))


@dataclass(frozen=True)
class _ContinuousAdjoint(Adjoint):
    """Options of the adjoints that solve the adjoint equation `dl/dt = -(df/du)^T l`.

    Args:
        rtol: relative tolerance of the backward solve; default the forward solve's.
        atol: absolute tolerance of the backward solve; default the forward solve's.
        max_steps: accepted and rejected steps of the backward solve; default the forward solve's.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        where = type(self).__name__
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None:
                checks.settle(self, **{name: checks.number(f"{where}: {name}", value, above=0)})
        if self.max_steps is not None:
            checks.settle(self, max_steps=checks.whole(f"{where}: max_steps", self.max_steps))


@dataclass(frozen=True)
class InterpolatingAdjoint(_ContinuousAdjoint):
    """Solves the adjoint equation backward along the dense forward solution.

    The parameter gradient is integrated beside the adjoint state and does not drive the step size
    (Kidger, Chen, Lyons: "Hey, that's not an ODE", arXiv 2009.09457). Of an ensemble on the torch
    engine it is one sum for all members, and takes the memory of the parameters once.

    Reference: Y. Ma et al., arXiv 1812.01892.
    """


@dataclass(frozen=True)
class GaussAdjoint(_ContinuousAdjoint):
    """Solves the adjoint equation, and takes parameter gradients by Gauss quadrature on its steps.

    It is the cheapest of the continuous adjoints where there are many parameters: gradients of the
    field in them are taken at the quadrature nodes only, not at every stage.

    Reference: A. Norcliffe, M. P. Deisenroth, arXiv 2308.10644; GaussAdjoint of
    SciMLSensitivity.jl.
    """


@dataclass(frozen=True)
class BacksolveAdjoint(_ContinuousAdjoint):
    """Solves state and adjoint backward together.

    The state is set back onto the forward solution wherever a cotangent enters. Between those times
    it is recomputed backward, which is unstable for dissipative fields: check gradients before you
    rely on it. The method needs the memory of one state only. This engine keeps the steps' states
    all the same, for dense output.

    Reference: Chen et al., Neural Ordinary Differential Equations, arXiv 1806.07366, Algorithm 1.
    """


@dataclass(frozen=True)
class QuadratureAdjoint(_ContinuousAdjoint):
    """Solves the adjoint equation with dense output, then integrates the parameter gradient.

    It runs on the Julia engine only. It keeps both solutions, and is accurate and sound for stiff
    problems of moderate size.

    Reference: Y. Ma et al., arXiv 1812.01892 (QuadratureAdjoint of SciMLSensitivity.jl).
    """


@dataclass(frozen=True)
class ForwardDiffSensitivity(Adjoint):
    """Solves again with dual numbers, which carry the derivative of the discretised solution.

    It runs on the Julia engine only. Its cost grows with the number of states and parameters
    together, so it suits few of both (SciML's advice: below 100).

    Reference: ForwardDiffSensitivity of SciMLSensitivity.jl.
    """
