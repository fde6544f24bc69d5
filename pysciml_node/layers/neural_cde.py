"""A neural controlled differential equation as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Unpack, cast

from torch import Tensor
from typing_extensions import override

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.interpolate import PiecewisePolynomial, evaluate
from pysciml_node.layers.neural_de import Out, Output
from pysciml_node.layers.neural_ode import NeuralODE
from pysciml_node.layers.options import SolverOptions
from pysciml_node.regularizers.base import Times


class NeuralCDE(NeuralODE[Out], Generic[Out]):
    """Solves `dz = field(t, z) dX` along a path `X` that is made of data.

    Steps end on the knots of the path, where its derivatives jump, forward and backward. Gradients
    also reach the path's coefficients. With `compile=True` field and path are native code, one
    program for all paths with as many knots.

    Args:
        field: the vector field: `field(t, z)` or `field(z)` is a matrix for each sample,
            `(B, hidden, channels)`. Where it has a method `prod(t, z, dx)` that returns the product
            of the matrices with vectors `(B, channels)`, this is called instead, and no matrix is
            made.
        algorithm: default `Tsit5()`.
        stop_at_knots: whether steps end on the knots. A cubic path of very many knots may be solved
            in fewer steps without, less accurately than the tolerances say.
        output: what a call returns: the `"solution"`, or its end state `"u1"`.
        options: as in `NeuralODE`.

    Raises:
        TypeError: a field that is not callable, an unknown option.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> class Field(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(8, 8 * 3)
        ...     def forward(self, t, z):
        ...         return torch.tanh(self.net(z)).view(-1, 8, 3)
        >>> path = psn.interpolate.hermite_cubic(torch.rand(16, 20, 3))
        >>> cde = psn.NeuralCDE(Field(), rtol=1e-3, atol=1e-3, output="u1")
        >>> cde(torch.zeros(16, 8), path).shape
        torch.Size([16, 8])

    Reference: P. Kidger, J. Morrill, J. Foster, T. Lyons, Neural controlled differential equations
    for irregular time series, arXiv 2005.08926.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        algorithm: Algorithm | None = None,
        *,
        stop_at_knots: bool = True,
        output: Output = "solution",
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(field, algorithm, output=cast(Any, output), **options)
        self.stop_at_knots = checks.flag("stop_at_knots", stop_at_knots)

    @override
    def forward(  # type: ignore[override]
        self, z0: Tensor, path: PiecewisePolynomial, saveat: Times | None = None
    ) -> Out:
        """Solve from `z0` of shape `(B, hidden)` over the interval of a path.

        Args:
            z0: initial state; often a layer of `path(path.interval[0])`.
            path: the control, made by a function of `pysciml_node.interpolate`.
            saveat: times of `solution.u`, for this call; `path.times` for one state an observation.

        Returns:
            The solution, whose `u1` has the shape of `z0`; or this end state.
        """
        checks.instance("path", path, PiecewisePolynomial, example="interpolate.linear(x)")
        given = (path.knots, path.coefficients)
        returned: Out = self.give(self.integrate(z0, given, path.interval, saveat))
        return returned

    @override
    def function(self, name: str) -> Callable[..., Any]:
        field, product = super().function(name), getattr(self.field, "prod", None)
        known = self._functions.get("controlled")
        # One function for one field: native code knows it again. Methods are made anew each time.
        if known is None or known[0][0] is not field or known[0][1] != product:
            known = self._functions["controlled"] = (field, product), _Controlled(field, product)
        return known[1]

    @override
    def solve(self, problem: Any, **arguments: Any) -> Any:
        knots, _ = problem.p
        stops = list(arguments.pop("tstops", self.options.get("tstops", ())))
        if self.stop_at_knots:
            stops = sorted({*stops, *knots[1:-1].tolist()})
        return super().solve(problem, tstops=stops, **arguments)


class _Controlled:
    """The vector field of `z` along a path, whose knots and coefficients are the third argument."""

    def __init__(self, field: Callable[..., Any], product: Callable[..., Any] | None) -> None:
        self.field, self.product = field, product

    def __call__(self, t: Tensor, z: Tensor, path: tuple[Tensor, Tensor]) -> Tensor:
        knots, coefficients = path
        rate = evaluate(coefficients, knots, t, 1)
        if self.product is not None:
            return cast(Tensor, self.product(t, z, rate))
        matrix = self.field(t, z)
        if not isinstance(matrix, Tensor) or matrix.shape != (*z.shape, rate.shape[-1]):
            found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(
                f"the field must return matrices of shape {(*z.shape, rate.shape[-1])}, one row "
                f"for each entry of the state, but returned {found}.\n"
                "  End it with .view(-1, hidden, channels)."
            )
        return (matrix @ rate.unsqueeze(-1)).squeeze(-1)
