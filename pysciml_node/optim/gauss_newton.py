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
        raise ValueError(
            "curvature needs the graph of the outputs, but they do not require a gradient.\n"
            "  Pass the solution of a solve made with gradients enabled, not detached."
        )
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
        raise ValueError(
            "the graph of the outputs was freed by loss.backward().\n"
            "  Call loss.backward(retain_graph=True), or pass step() a closure that returns "
            "(loss, solution) and does not call backward."
        ) from error
    return list(products)


def hutchinson_diagonal(
    outputs: Tensor, params: Sequence[Tensor], probes: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    r"""Estimate the diagonal of the Gauss-Newton matrix, `C_i = E[sum_d (dx_d/dtheta_i)^2]`.

    `E_v[(J^T v)_i^2] = sum_{b,d} J_{bd,i}^2` for independent random signs `v`, one vector-Jacobian
    product a probe. Where there are as many probes as outputs, unit vectors take their place and
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


def refuse_unreached(
    outputs: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    curvature: Sequence[Tensor],
    *,
    damped: bool,
) -> None:
    """Refuse parameters that the loss depends on and the outputs do not: they have no curvature.

    Their gradients would be divided by the damping alone, or by zero, and steps have any size.

    Args:
        outputs: `(B, n)`, with a graph that reaches the parameters.
        params: the parameters.
        grads: their gradients.
        curvature: the known part of each parameter's curvature; 0 where nothing is known.
        damped: whether there is damping; then single entries may have no curvature.

    Raises:
        ValueError: a parameter has a gradient and no curvature.
    """

    def unreached(grad: Tensor, known: Tensor) -> bool:
        if damped and bool(known.any()):
            return False
        return bool(((known == 0) & (grad != 0)).any())

    pairs = zip(grads, curvature, strict=True)
    suspects = [k for k, (grad, known) in enumerate(pairs) if unreached(grad, known)]
    if not suspects:
        return
    # Products with random signs can cancel by chance, products with normal numbers do not.
    generator = torch.Generator(device=outputs.device).manual_seed(0)
    probe = torch.empty_like(outputs).normal_(generator=generator)
    products = pull_back(outputs, [params[k] for k in suspects], probe)
    for k, product in zip(suspects, products, strict=True):
        if unreached(grads[k], curvature[k].abs() + product.abs()):
            raise ValueError(
                f"the outputs do not depend on parameter {k}, of shape {tuple(params[k].shape)}, "
                "but the loss does: the outputs give it no curvature.\n"
                "  Pass as solution the outputs of the whole model, its head included, or give "
                "such parameters an optimizer of their own."
            )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into views of the shapes of `like`."""
    pieces = torch.split(vector, [tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


def set_parameters(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into parameters behind autograd's back.

    `.data` leaves the version counters as they are. So a graph built at the old values stays usable
    once they are back. Products of one operator at perturbed parameters rely on that.
    """
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)


class GaussNewton:
    r"""Products with `C = J^T J / B`, `J` the Jacobian of `B` samples' outputs in the parameters.

    `J^T w` is a vector-Jacobian product through the solver's adjoint. `J v` is either a central
    difference of the outputs, which works with every adjoint, or the derivative of `J^T w` in `w`,
    which is exact and needs a solve that can be differentiated twice.

    Args:
        outputs: `(B, n)` at the present parameters, with a graph that reaches them.
        params: the parameters, all of one dtype and device.
        evaluate: gives the outputs `(B, n)` at the parameters' present values; None for the exact
            product.
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

    @property
    def weight(self) -> float:
        """`1 / B`, the weight of a sample in `C`."""
        return 1.0 / self._outputs.shape[0]

    def pull_back(self, tangent: Tensor) -> Tensor:
        """Return `J^T w / B`, flat, for `w` of the shape of the outputs."""
        product = flatten(pull_back(self._outputs, self._params, tangent.view_as(self._outputs)))
        return product.mul_(self.weight)

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
            raise ValueError(
                "jvp='double-backward' needs outputs that can be differentiated twice, which this "
                f"solve's adjoint does not allow ({error}).\n"
                "  Solve with adjoint=psn.DirectAdjoint(), or use jvp='finite-difference'."
            ) from error
        return tangent


class DampedSolve(NamedTuple):
    """Solution of `(C + shift) s = g` in a space of products.

    Attributes:
        step: `s`, flat.
        image: `C s`, without the damping.
    """

    step: Tensor
    image: Tensor


class ProductSpace:
    r"""Solves `(C + diag(damping) c) s = g`, `c = g . C g / g . g`, for one `g` and any damping.

    Measuring the damping in units of the curvature along the gradient makes the step equivariant:
    units of time, state, or loss do not change how strongly it is damped.

    The equations are solved on a space that grows by the residual; for equal damping it is the
    space of conjugate gradients. An orthonormal basis `v_1, v_2, ...` of it is kept with the
    products `C v_i`. That costs their memory, and saves the products of every further damping. The
    basis stays orthogonal, so a space as large as the rank of `C` holds the solution. On it `C` is
    the matrix of the inner products of `J v_i`, which is positive semidefinite whatever the errors
    of differencing, and does not square the condition of `J`.

    Args:
        operator: products with `C` and `J`.
        gradient: `g`, flat.

    Reference: Saad, Iterative Methods for Sparse Linear Systems (2003), section 6.4.1.
    """

    def __init__(self, operator: GaussNewton, gradient: Tensor) -> None:
        self._operator = operator
        self._gradient = gradient
        self._size = float(gradient.norm())
        self._basis = gradient.new_empty(0, len(gradient))
        self._products = gradient.new_empty(0, len(gradient))
        self._tangents = gradient.new_empty(0, 0)

    def solve(self, damping: Tensor, *, max_steps: int, rtol: float) -> DampedSolve:
        """Solve to a residual of `rtol |g|`, with a space of dimension `max_steps` at most.

        Args:
            damping: nonnegative, flat, dimensionless.
            max_steps: products at most, over all calls.
            rtol: residual at which to stop, relative to the gradient.
        """
        if self._size == 0.0:
            return DampedSolve(*torch.zeros_like(self._gradient).expand(2, -1).clone())
        if len(self._basis) == 0:
            self._extend(self._gradient)
        while True:
            shift = damping * self._along_gradient
            weights = self._project(shift)
            solved = DampedSolve(weights @ self._basis, weights @ self._products)
            residual = self._gradient - solved.image - shift * solved.step
            done = float(residual.norm()) <= rtol * self._size
            if done or len(self._basis) >= max_steps or not self._extend(residual):
                return solved

    @property
    def along_gradient(self) -> Tensor:
        """`C g`, up to a factor; 0 without a gradient."""
        return self._products[0] if len(self._products) else torch.zeros_like(self._gradient)

    @property
    def _along_gradient(self) -> float:
        return float(self._tangents[0].square().sum()) * self._operator.weight

    def _extend(self, direction: Tensor) -> bool:
        """Add a direction; False if it lies in the space to rounding."""
        fresh = direction / direction.norm()
        for _ in range(2):  # the second pass removes what rounding left of the first
            fresh = fresh - (self._basis @ fresh) @ self._basis
        left = float(fresh.norm())
        if not left > len(fresh) * torch.finfo(fresh.dtype).eps:
            return False
        fresh = fresh / left
        tangent = self._operator.push_forward(fresh)
        product = self._operator.pull_back(tangent)
        # The error of a difference is mostly one of length, and (J v) . w = v . J^T w is known.
        square = float(tangent.square().sum()) * self._operator.weight
        correction = float(fresh @ product) / square if square > 0.0 else 1.0
        tangent, product = tangent * correction, product * correction
        self._basis = torch.cat([self._basis, fresh[None]])
        self._products = torch.cat([self._products, product[None]])
        self._tangents = torch.cat(
            [self._tangents.reshape(-1, tangent.numel()), tangent.reshape(1, -1)]
        )
        return True

    def _project(self, shift: Tensor) -> Tensor:
        """Coordinates of the solution on the space."""
        inner = self._tangents @ self._tangents.T * self._operator.weight
        inner = inner + (self._basis * shift) @ self._basis.T
        values, vectors = torch.linalg.eigh(inner)
        kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        inverse = torch.where(kept, 1.0 / values, 0.0)
        coordinates: Tensor = vectors @ (inverse * (vectors.T @ (self._basis @ self._gradient)))
        return coordinates
