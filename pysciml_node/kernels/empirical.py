"""The neural tangent kernel of an actual module, at its actual parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from pysciml_node import checks

Outputs: TypeAlias = Literal["full", "trace"]
Method: TypeAlias = Literal["auto", "jacobian", "products", "autograd"]
Weights: TypeAlias = dict[str, Tensor]

_BUDGET = 512 * 2**20  # bytes that Jacobians may take


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Put the parameters back as they were.

    `functional_call` leaves its substitutes in a submodule that is registered under two names.
    """
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put the contents of the buffers back, which forward passes in train mode may change."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                buffer.copy_(kept)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@torch.no_grad()
def _refuse_randomness(network: _Network, sample: Tensor) -> None:
    """A kernel is one of a fixed function: refuse modules that draw random numbers.

    Raises:
        ValueError: the module is random.
    """
    before = _random_state(sample.device)
    first = network.in_place(sample)
    drawn = not all(map(torch.equal, before, _random_state(sample.device)))
    second = network.in_place(sample)
    if not drawn and torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True):
        return
    name, training = type(network.module).__name__, network.module.training
    remedy = (
        "Call module.eval() first."
        if training
        else "Give it a generator that is seeded anew in each forward pass."
    )
    raise ValueError(
        f"{name} draws random numbers{' in train mode' if training else ''}, so that its tangent "
        f"kernel is random.\n  {remedy}"
    )


@dataclass(frozen=True)
class _Network:
    """A module as a function of the parameters to be differentiated."""

    module: nn.Module
    weights: Weights
    buffers: Weights

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """Outputs `(B, o)` at given weights."""
        with _restored(self.module):
            out = functional_call(self.module, (weights, self.buffers), (x,))
        return self._checked(out, x)

    def in_place(self, x: Tensor) -> Tensor:
        """Outputs `(B, o)` at the module's own parameters."""
        return self._checked(self.module(x), x)

    def _checked(self, out: object, x: Tensor) -> Tensor:
        if not isinstance(out, Tensor):
            raise TypeError(
                f"empirical_ntk needs a module that returns a tensor, but "
                f"{type(self.module).__name__} returned {type(out).__name__}.\n"
                "  Wrap it, for example to return solution.u1."
            )
        if out.is_complex():
            raise TypeError(
                f"empirical_ntk needs a module with real outputs, but they are {out.dtype}.\n"
                "  Wrap it to return torch.view_as_real(output)."
            )
        return out.reshape(len(x), -1)

    def one(self, weights: Weights, sample: Tensor) -> Tensor:
        """Outputs `(o,)` of one sample."""
        return self(weights, sample.unsqueeze(0))[0]


def empirical_ntk(
    module: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    outputs: Outputs = "full",
    method: Method = "auto",
    memory: int = _BUDGET,
) -> Tensor:
    """Neural tangent kernel of a module at its parameters.

        Theta[i, j, a, b] = sum_p  d f_a(x1_i) / d theta_p   d f_b(x2_j) / d theta_p

    over the parameters that require a gradient. Each sample is passed on its own: a module that
    solves an ODE with an adaptive method then chooses its steps for that sample.

    Args:
        module: any module from a batch `(B, *D)` to a tensor `(B, ...)`, in the mode (train or
            eval) and at the parameters it has. It may contain an ODE solve.
        x1: inputs `(n1, *D)`.
        x2: inputs `(n2, *D)`; None means `x1`, at half the cost.
        outputs: `"full"` for all pairs of outputs, `"trace"` for their sum over `a = b`.
        method: `"jacobian"` contracts per-sample Jacobians made by `torch.func`, in blocks;
            `"products"` makes columns by one vector-Jacobian and one Jacobian-vector product and
            holds no Jacobian; `"autograd"` takes Jacobians by plain reverse mode, for modules
            `torch.func` cannot transform (custom autograd functions, data-dependent loops).
            `"auto"` contracts Jacobians where they fit into `memory`, uses products otherwise,
            and plain autograd where `torch.func` refuses the module.
        memory: bytes that Jacobians may take.

    Returns:
        `(n1, n2, o, o)` for `"full"`, `(n1, n2)` for `"trace"`; detached.

    Raises:
        ValueError: if no parameter requires a gradient, the module draws random numbers (dropout,
            and regularizers of a layer, in train mode), or an argument is not one of the above.
        TypeError: if the module returns no tensor, or parameters or outputs are complex.

    Examples:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.eye(3)
        >>> torch.equal(empirical_ntk(layer, x)[..., 0, 0], x)
        True

    Reference: Novak, Sohl-Dickstein and Schoenholz, arXiv 2206.08720, sections 3.1 and 3.2.
    """
    x1 = checks.tensor("x1", x1)
    x2 = None if x2 is None else checks.tensor("x2", x2)
    memory = checks.whole("memory", memory)
    _check(module, outputs, method, x1, x2)
    weights = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient, so its tangent "
            "kernel is empty.\n  Call module.requires_grad_(True)."
        )
    if any(weight.is_complex() for weight in weights.values()):
        raise TypeError(
            f"the parameters of {type(module).__name__} must be real, but some are complex.\n"
            "  Give it the real views of its parameters: torch.view_as_real."
        )
    frozen = {k: p.detach() for k, p in module.named_parameters() if not p.requires_grad}
    network = _Network(module, weights, {**dict(module.named_buffers()), **frozen})
    try:
        with _kept_buffers(module):
            _refuse_randomness(network, x1[:1])
            inputs = (x1, x1 if x2 is None else x2)
            return _kernel(network, inputs, x2 is None, outputs, method, memory)
    except (RuntimeError, TypeError, ValueError, IndexError):
        _check_samples(network, x1, x2)
        raise


def _check_samples(network: _Network, x1: Tensor, x2: Tensor | None) -> None:
    """Look for the reason of a failure: the module takes other samples."""
    for name, x in (("x1", x1), ("x2", x2)):
        try:
            with torch.no_grad():
                out = None if x is None else network.module(x[:1])
        except Exception as error:  # whatever the user's module raises
            raise ValueError(
                f"{name} must hold samples that the module takes, but it fails for one of shape "
                f"{tuple(x1.shape[1:])} and dtype {x1.dtype}: {error}\n"
                f"  Try module({name}[:1]): it has to take a batch of one."
            ) from error
        if isinstance(out, Tensor) and not out.is_floating_point():
            raise ValueError(
                f"module must return real numbers, but for {name} has {out.dtype}.\n"
                "  Return scores or logits; a complex output has two real parts."
            )


def _kernel(
    network: _Network,
    inputs: tuple[Tensor, Tensor],
    symmetric: bool,
    outputs: Outputs,
    method: Method,
    memory: int,
) -> Tensor:
    if method == "auto":
        method = _choose(network, *inputs, memory)
    if method == "products":
        kernel = _by_products(network, *inputs, outputs)
        return (kernel + _transposed(kernel)) / 2 if symmetric else kernel
    jacobian = _transformed_jacobian if method == "jacobian" else _reverse_jacobian
    return _by_contraction(network, jacobian, inputs, symmetric, outputs, memory)


def _check(module: nn.Module, outputs: str, method: str, x1: Tensor, x2: Tensor | None) -> None:
    checks.instance(
        "module", module, nn.Module, example="torch.nn.Linear(3, 1)", noun="an nn.Module"
    )
    checks.choice("outputs", outputs, get_args(Outputs))
    checks.choice("method", method, get_args(Method))
    for x in (x1, x2):
        if x is not None and (x.ndim == 0 or len(x) == 0):
            raise ValueError(
                "x1 and x2 must hold at least one sample.\n  A single sample x is x[None]."
            )
    if x2 is not None and (x1.shape[1:], x1.dtype) != (x2.shape[1:], x2.dtype):
        raise ValueError(
            f"x1 and x2 must hold samples of one shape and dtype, but have {tuple(x1.shape[1:])} "
            f"{x1.dtype} and {tuple(x2.shape[1:])} {x2.dtype}.\n"
            "  Convert x2: x2.to(x1.dtype).reshape(-1, *x1.shape[1:])."
        )


def _choose(network: _Network, x1: Tensor, x2: Tensor, memory: int) -> Method:
    """Products only where Jacobians do not fit; autograd where transforms are refused."""
    try:
        shape = vmap(lambda x: network.one(network.weights, x))(x1[:1]).shape
        _transformed_jacobian(network, x1[:1])
    except (RuntimeError, NotImplementedError, TypeError):
        return "autograd"
    numbers = sum(weight.numel() for weight in network.weights.values())
    size = (len(x1) + len(x2)) * shape[1] * numbers * x1.element_size()
    return "jacobian" if size <= memory else "products"


def _transformed_jacobian(network: _Network, x: Tensor) -> list[Tensor]:
    """Jacobians `(n, o, *weight)` of every weight."""
    per_sample = vmap(jacrev(network.one), in_dims=(None, 0))(network.weights, x)
    return [part.detach() for part in per_sample.values()]


def _reverse_jacobian(network: _Network, x: Tensor) -> list[Tensor]:
    """The same by one reverse pass a sample and output."""
    parameters = dict(network.module.named_parameters())
    weights = [parameters[name] for name in network.weights]
    rows: list[list[Tensor]] = [[] for _ in weights]
    for sample in x:
        with torch.enable_grad():
            out = network.in_place(sample.unsqueeze(0))[0]
            grads = [
                torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
                for value in out
            ]
        for k, parts in enumerate(zip(*grads, strict=True)):
            rows[k].append(torch.stack(parts))
    return [torch.stack(parts) for parts in rows]


def _contract(j1: list[Tensor], j2: list[Tensor], outputs: Outputs) -> Tensor:
    pattern = "iap,jbp->ijab" if outputs == "full" else "iap,jap->ij"
    total: Tensor | None = None
    for a, b in zip(j1, j2, strict=True):
        part = torch.einsum(pattern, a.flatten(2), b.flatten(2))
        total = part if total is None else total + part
    assert total is not None  # a network has at least one weight
    return total


def _transposed(kernel: Tensor) -> Tensor:
    """`Theta[j, i, b, a]`."""
    return kernel.T if kernel.ndim == 2 else kernel.permute(1, 0, 3, 2)


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _by_contraction(
    network: _Network,
    jacobian: Callable[[_Network, Tensor], list[Tensor]],
    inputs: tuple[Tensor, Tensor],
    symmetric: bool,
    outputs: Outputs,
    memory: int,
) -> Tensor:
    x1, x2 = inputs
    first = jacobian(network, x1[:1])
    row_bytes = sum(part.numel() * part.element_size() for part in first)
    size = max(1, memory // (2 * row_bytes))
    o = first[0].shape[1]
    shape = (len(x1), len(x2)) + ((o, o) if outputs == "full" else ())
    kernel = first[0].new_empty(shape)
    for rows in _blocks(len(x1), size):
        j1 = jacobian(network, x1[rows])
        for columns in _blocks(len(x2), size):
            if symmetric and columns.start < rows.start:
                continue
            same = symmetric and columns.start == rows.start
            block = _contract(j1, j1 if same else jacobian(network, x2[columns]), outputs)
            kernel[rows, columns] = block
            if symmetric and not same:
                kernel[columns, rows] = _transposed(block)
    return kernel


def _by_products(network: _Network, x1: Tensor, x2: Tensor, outputs: Outputs) -> Tensor:
    """Column `(j, b)` is the derivative of `f(x1)` along the gradient of `f_b(x2_j)`."""
    weights = network.weights

    def column(cotangent: Tensor, sample: Tensor) -> Tensor:
        pullback = vjp(lambda w: network.one(w, sample), weights)[1]
        (direction,) = pullback(cotangent)
        every = vmap(network.one, in_dims=(None, 0))
        tangent: Tensor = jvp(lambda w: every(w, x1), (weights,), (direction,))[1]
        return tangent

    columns = []
    for sample in x2:
        o = network.one(weights, sample).numel()
        units = torch.eye(o, dtype=x1.dtype, device=x1.device)
        block = torch.stack([column(unit, sample) for unit in units])  # (b, i, a)
        columns.append(
            block.permute(1, 2, 0) if outputs == "full" else torch.einsum("aia->i", block)
        )
    return torch.stack(columns, 1).detach()
