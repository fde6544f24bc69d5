"""A neural stochastic differential equation as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, Literal, Unpack, cast, overload

import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.layers.autonomous import check_function
from pysciml_node.layers.neural_de import NeuralDE, Out, Output
from pysciml_node.layers.options import SolverOptions
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.ode import Time
from pysciml_node.problems.sde import Interpretation, Noise, SDEProblem
from pysciml_node.problems.state import State
from pysciml_node.regularizers.base import Regularizer
from pysciml_node.solutions.solution import Solution


class NeuralSDE(NeuralDE[Out], Generic[Out]):
    """Solves `du = drift(t, u) dt + diffusion(t, u) dW` from its input over a fixed interval.

    Every call draws a new Brownian path. In training mode the regularizers are evaluated and
    `solution.penalty` is their weighted sum; in eval mode they cost nothing and it is 0.

    Args:
        drift: `drift(t, u)`, or with a third argument `p`; usually an `nn.Module`.
        diffusion: likewise, in the shape that `noise` asks for.
        algorithm: default what the noise asks for (`SOSRI()` for diagonal noise). General Ito noise
            needs `controller=FixedStep()` and `dt0`.
        tspan: the interval.
        noise: `"diagonal"`, `"scalar"`, `"additive"` or `"general"`.
        interpretation: `"ito"` or `"stratonovich"`.
        generator: draws the seeds of the Brownian paths; default torch's own.
        output: what a call returns: the `"solution"`, or its end state `"u1"`; `node.penalty` and
            `node.last` are then of the last call.
        options: `rtol` and `atol` (both 1e-2), `regularizers` (those of local and of all steps'
            estimates), `adjoint`, `saveat` (times of `solution.u`; without it the ends of the
            steps), `engine`, and the other arguments of `solve`, such as `dt0`, `controller` or
            `max_steps`: see `SolverOptions`.

    Raises:
        TypeError: a drift or diffusion that is not callable, an unknown option, a regularizer of
            another kind.
        ValueError: a regularizer that is an integral along the solution, or moves its end.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> class Linear(torch.nn.Linear):
        ...     def forward(self, t, u):
        ...         return super().forward(u)
        >>> node = psn.NeuralSDE(Linear(3, 3), Linear(3, 3), psn.SOSRI(), rtol=0.1, atol=0.1,
        ...                      regularizers=[psn.LocalError("unbiased", weight=10.0)])
        >>> solution = node(torch.ones(8, 3))
        >>> solution.u1.shape, bool(solution.penalty > 0)
        (torch.Size([8, 3]), True)
    """

    usual_tolerance: ClassVar[float] = 1e-2
    fields: ClassVar[tuple[str, ...]] = ("drift", "diffusion")

    @overload
    def __init__(
        self: NeuralSDE[Solution],
        drift: Callable[..., Any],
        diffusion: Callable[..., Any],
        algorithm: Algorithm | None = ...,
        tspan: tuple[Time, Time] = ...,
        *,
        noise: Noise = ...,
        interpretation: Interpretation = ...,
        generator: torch.Generator | None = ...,
        output: Literal["solution"] = ...,
        **options: Unpack[SolverOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: NeuralSDE[Any],
        drift: Callable[..., Any],
        diffusion: Callable[..., Any],
        algorithm: Algorithm | None = ...,
        tspan: tuple[Time, Time] = ...,
        *,
        noise: Noise = ...,
        interpretation: Interpretation = ...,
        generator: torch.Generator | None = ...,
        output: Literal["u1"],
        **options: Unpack[SolverOptions],
    ) -> None: ...

    def __init__(
        self,
        drift: Callable[..., Any],
        diffusion: Callable[..., Any],
        algorithm: Algorithm | None = None,
        tspan: tuple[Time, Time] = (0.0, 1.0),
        *,
        noise: Noise = "diagonal",
        interpretation: Interpretation = "ito",
        generator: torch.Generator | None = None,
        output: Output = "solution",
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(algorithm, tspan, output, options)
        for name, given in (("drift", drift), ("diffusion", diffusion)):
            check_function(name, given, "t", "u")
        for regularizer in cast(Iterable[Regularizer], self.regularizers):
            if not regularizer.of_stochastic:
                raise ValueError(
                    f"{type(regularizer).__name__} is for ordinary equations.\n"
                    "  Use LocalError, LocalStiffness, GlobalError or GlobalStiffness."
                )
        self.drift, self.diffusion = drift, diffusion
        self.noise, self.interpretation = noise, interpretation
        self.generator = generator

    @uncompiled
    def forward(
        self,
        u0: State,
        p: Any = None,
        tspan: tuple[Time, Time] | None = None,
        saveat: Sequence[float] | Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Out:
        """Solve from `u0` of shape `(B, *D)`.

        Args:
            u0: initial state.
            p: extra argument of drift and diffusion.
            tspan: another interval, for this call.
            saveat: other times of `solution.u`, for this call.
            generator: another source of the path's seed, for this call.

        Returns:
            The solution, whose `u1` has the shape of `u0`; or this end state.
        """
        given = SDEProblem(
            self.function("drift"),
            self.function("diffusion"),
            u0,
            self.tspan if tspan is None else tspan,
            self.noise,
            self.interpretation,
            p,
        )
        with self.ready(given) as problem:
            solution = self.solve(
                problem,
                saveat=self.saveat if saveat is None else saveat,
                generator=self.generator if generator is None else generator,
            )
            self.penalize(solution, self.active_regularizers())
        returned: Out = self.give(solution)
        return returned
