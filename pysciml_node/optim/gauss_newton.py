"""Gauss-Newton curvature `E[(dx/dtheta)^T (dx/dtheta)]`: diagonal, products, inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def pull_back(
    outputs: Tensor, params: Sequence[Tensor], cotangent: Tensor, *, create_graph: bool = False
) -> list[Tensor]:
    """One vector-Jacobian product `J^T v`; the graph of `outputs` is kept.

    Args:
        outputs: `(B, n)`, with a graph that reaches the parameters.
        params: the parameters, of any shapes.
        cotangent: `v`, of the shape of `outputs`.
        create_graph: keep the product itself differentiable.

    Returns:
        One tensor a parameter, zeros where the outputs do not depend on it.

    Raises:
        ValueError: the outputs have no graph, or it was freed by an earlier backward.
    """
    if not outputs.requires_grad:
        msg = (
            "curvature needs the graph of the outputs, but they do not require a gradient: pass "
            "the solution of a solve made with gradients enabled, not detached"
        )
        raise ValueError(msg)
    try:
        products = torch.autograd.grad(
            outputs,
            params,
            cotangent,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        msg = (
            "the graph of the outputs was freed by loss.backward(): call "
            "loss.backward(retain_graph=True), or pass step() a closure that returns "
            "(loss, solution) and does not call backward"
        )
        raise ValueError(msg) from error
    return list(products)


def hutchinson_diagonal(
    outputs: Tensor, params: Sequence[Tensor], probes: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    r"""Estimate the diagonal of the Gauss-Newton matrix, `C_i = E[sum_d (dx_d/dtheta_i)^2]`.

    `E_v[(J^T v)_i^2] = sum_{b,d} J_{bd,i}^2` for independent random signs `v`, one vector-Jacobian
    product a probe. As many probes as outputs or more are exchanged for the unit vectors, which
    give the diagonal exactly.

    Args:
        outputs: `(B, n)`, with a graph that reaches the parameters.
        params: the parameters, of any shapes.
        probes: number of products, at least 1.
        generator: source of the signs, on the device of the outputs.

    Returns:
        One nonnegative tensor a parameter, in its shape.

    Reference: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990) 433-450.
    """
    size = outputs.numel()
    exact = probes >= size
    total = [torch.zeros_like(p) for p in params]
    for index in range(size if exact else probes):
        if exact:
            probe = (
                torch.zeros_like(outputs)
                .view(-1)
                .index_fill_(0, torch.tensor(index, device=outputs.device), 1.0)
            )
            probe = probe.view_as(outputs)
        else:
            bits = torch.randint(2, outputs.shape, generator=generator, device=outputs.device)
            probe = bits.to(outputs.dtype).mul_(2).sub_(1)
        for entry, product in zip(total, pull_back(outputs, params, probe), strict=True):
            entry.addcmul_(product, product)
    weight = 1.0 / (outputs.shape[0] * (1 if exact else probes))
    return [entry.mul_(weight) for entry in total]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into views of the shapes of `like`."""
    pieces = torch.split(vector, [tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


def set_parameters(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into parameters behind autograd's back.

    `.data` leaves the version counters as they are. A graph built at the old values stays usable
    once these are back, which products of one operator at perturbed parameters rely on.
    """
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)


class GaussNewton:
    r"""Products with `C = J^T J / B`, `J` the Jacobian of `B` samples' outputs in the parameters.

    `J^T w` is a vector-Jacobian product through the solver's adjoint. `J v` is either a central
    difference of the outputs, which asks nothing of the adjoint, or the derivative of `J^T w` in
    `w`, exact, which asks for a solve that can be differentiated twice.

    Args:
        outputs: `(B, n)` at the present parameters, with a graph that reaches them.
        params: the parameters, all of one dtype and device.
        evaluate: outputs `(B, n)` at the values the parameters hold when it is called; None for
            the exact product.
        fd_step: length of the difference in parameter space, relative to `1 + |theta|`.
    """

    def __init__(
        self,
        outputs: Tensor,
        params: Sequence[Tensor],
        evaluate: Callable[[], Tensor] | None,
        fd_step: float,
    ) -> None:
        self._outputs = outputs
        self._params = params
        self._evaluate = evaluate
        self._saved = [param.detach().clone() for param in params]
        self._fd_length = fd_step * (1.0 + float(flatten(self._saved).norm()))
        self._double: tuple[Tensor, Tensor] | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """Return `C v` for a flat vector."""
        tangent = self.push_forward(vector).view_as(self._outputs)
        product = flatten(pull_back(self._outputs, self._params, tangent))
        return product.div_(self._outputs.shape[0])

    def push_forward(self, vector: Tensor) -> Tensor:
        """Return `J v`, `(B, n)`, for a flat vector."""
        if self._evaluate is None:
            return self._double_backward(vector)
        length = float(vector.norm())
        if length == 0.0:
            return torch.zeros_like(self._outputs)
        width = self._fd_length / length
        ends: list[Tensor] = []
        try:
            for sign in (1.0, -1.0):
                shift = unflatten(vector * (sign * width), self._saved)
                set_parameters(self._params, torch._foreach_add(self._saved, shift))
                ends.append(self._evaluate())
        finally:
            set_parameters(self._params, self._saved)
        return (ends[0] - ends[1]).div_(2.0 * width)

    def _double_backward(self, vector: Tensor) -> Tensor:
        try:
            with torch.enable_grad():
                if self._double is None:
                    cotangent = torch.zeros_like(self._outputs, requires_grad=True)
                    product = pull_back(self._outputs, self._params, cotangent, create_graph=True)
                    self._double = cotangent, flatten(product)
                cotangent, pulled = self._double
                (tangent,) = torch.autograd.grad(pulled, cotangent, vector, retain_graph=True)
        except RuntimeError as error:
            msg = (
                "jvp='double-backward' needs outputs that can be differentiated twice, which this "
                f"solve's adjoint does not allow ({error}).\n"
                "  Solve with adjoint=psn.DirectAdjoint(), or use jvp='finite-difference'."
            )
            raise ValueError(msg) from error
        return tangent


class DampedSolve(NamedTuple):
    """Solution of `(C + shift) s = g` by conjugate gradients.

    Attributes:
        step: `s`, flat.
        image: `C s`, without the damping.
    """

    step: Tensor
    image: Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    gradient: Tensor,
    damping: Tensor,
    *,
    max_steps: int,
    rtol: float,
) -> DampedSolve:
    r"""Solve `(C + diag(damping) c) s = g`, where `c = g . C g / g . g`.

    Measuring the damping in units of the curvature along the gradient makes the step equivariant:
    units of time, state, or loss do not change how strongly it is damped.

    Args:
        product: `v -> C v`, positive semidefinite.
        gradient: `g`, flat.
        damping: nonnegative, flat, dimensionless.
        max_steps: products at most.
        rtol: stop when the residual has fallen by this factor.

    Returns:
        The step and its product with `C`.

    Reference: Hestenes, Stiefel, J. Res. Natl. Bur. Stand. 49 (1952) 409-436.
    """
    solved = DampedSolve(torch.zeros_like(gradient), torch.zeros_like(gradient))
    residual = gradient.clone()
    direction = gradient.clone()
    initial = square = float(residual @ residual)
    shift = torch.zeros_like(gradient)
    for index in range(max_steps if initial > 0.0 else 0):
        image = product(direction)
        if index == 0:
            shift = damping * ((direction @ image) / initial)
        damped = torch.addcmul(image, shift, direction)
        along = float(direction @ damped)
        # Rounding and differencing leave a singular operator's null space slightly indefinite.
        if not along > 0.0:
            break
        length = square / along
        solved.step.add_(direction, alpha=length)
        solved.image.add_(image, alpha=length)
        residual.sub_(damped, alpha=length)
        previous, square = square, float(residual @ residual)
        if square <= rtol * rtol * initial:
            break
        direction = torch.add(residual, direction, alpha=square / previous)
    return solved
