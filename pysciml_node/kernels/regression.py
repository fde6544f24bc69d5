"""Predictions of a kernel: regression, and gradient descent in closed form.

The loss throughout is `1/(2n) sum_i |f(x_i) - y_i|^2`. Under gradient descent with learning rate
`lr` a network whose tangent kernel stays `Theta` obeys `f <- f - (lr/n) Theta (f - y)` on its
`n` training inputs: linear, and diagonal in the eigenvectors of `Theta`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pysciml_node import checks


def _square(kernel: Tensor, name: str) -> Tensor:
    kernel = checks.tensor(name, kernel, precise=True, finite=True, filled=True)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(
            f"{name} must be square, but has shape {tuple(kernel.shape)}.\n"
            "  Compute it with x2=None: the training inputs against themselves."
        )
    gap = float((kernel - kernel.T).abs().max())
    scale = float(kernel.abs().max())
    if gap > 1e3 * torch.finfo(kernel.dtype).eps * scale:
        raise ValueError(
            f"{name} must be symmetric, but {name} - {name}.T reaches {gap:.2e}.\n"
            "  Compute it with x2=None, or symmetrise it."
        )
    return kernel


def _beside(kernel: Tensor, name: str, value: Tensor) -> Tensor:
    """A tensor that is used with a kernel: of its dtype and device."""
    value = checks.tensor(name, value, precise=True)
    if value.dtype != kernel.dtype or value.device != kernel.device:
        raise TypeError(
            f"{name} must be {kernel.dtype} on {kernel.device} like the kernel, but is "
            f"{value.dtype} on {value.device}.\n  Convert it: {name}.to(kernel)."
        )
    return value


def _cross(kernel: Tensor, value: Tensor, name: str = "cross") -> Tensor:
    """A kernel of test against training inputs, `(m, n)`."""
    value = _beside(kernel, name, value)
    if value.ndim != 2 or value.shape[1] != len(kernel):
        raise ValueError(
            f"{name} must have shape (m, {len(kernel)}), test against training inputs, but has "
            f"shape {tuple(value.shape)}.\n  Compute it between test and training inputs."
        )
    return value


def _variances(kernel: Tensor, prior: Tensor, name: str = "prior") -> Tensor:
    """The diagonal of a kernel of test inputs that is given whole, `(m, m)`, or as it is."""
    prior = _beside(kernel, name, prior)
    if prior.ndim == 1:
        return prior
    if prior.ndim != 2 or prior.shape[0] != prior.shape[1]:
        raise ValueError(
            f"{name} must have shape (m, m), or (m,) of its diagonal, but has shape "
            f"{tuple(prior.shape)}.\n  Compute it with x1 the test inputs and x2=None."
        )
    return prior.diagonal()


def _columns(targets: Tensor, n: int, name: str) -> Tensor:
    if targets.ndim not in (1, 2) or targets.shape[0] != n:
        raise ValueError(
            f"{name} must have shape ({n},) or ({n}, o), one row a training input, but has shape "
            f"{tuple(targets.shape)}.\n  Transpose it where the rows are outputs: {name}.T."
        )
    return targets.reshape(n, -1)


def spectrum(kernel: Tensor) -> Tensor:
    """Eigenvalues of a kernel matrix `(n, n)`, largest first.

    Raises:
        ValueError: if the matrix is not square and symmetric.

    Examples:
        >>> spectrum(torch.diag(torch.tensor([1.0, 3.0])))
        tensor([3., 1.])
    """
    values: Tensor = torch.linalg.eigvalsh(_square(kernel, "kernel"))
    return values.flip(0)


def condition_number(kernel: Tensor) -> float:
    """Largest over smallest eigenvalue; infinite where the smallest is zero to rounding.

    Gradient descent at the best learning rate needs about this many steps to gain a factor e.

    Examples:
        >>> condition_number(torch.diag(torch.tensor([1.0, 3.0])))
        3.0
    """
    values = spectrum(kernel)
    largest, smallest = float(values[0]), float(values[-1])
    if smallest <= len(values) * torch.finfo(values.dtype).eps * largest:
        return float("inf")
    return largest / smallest


def rank(kernel: Tensor, rtol: float | None = None) -> int:
    """Number of eigenvalues above `rtol` times the largest (default: `n` times epsilon).

    Examples:
        >>> rank(torch.ones(3, 3))
        1
    """
    values = spectrum(kernel)
    rounding = len(values) * torch.finfo(values.dtype).eps
    cut = rounding if rtol is None else checks.number("rtol", rtol, at_least=0)
    return int((values > cut * values[0]).sum())


def max_learning_rate(kernel: Tensor) -> float:
    """Learning rate `2 n / lambda_max` below which gradient descent is stable.

    Examples:
        >>> max_learning_rate(torch.diag(torch.tensor([1.0, 4.0])))
        1.0
    """
    return _stable_rate(spectrum(kernel)[0], len(kernel))


def _stable_rate(largest: Tensor, n: int) -> float:
    if not largest > 0:
        raise ValueError(
            f"kernel must have a positive eigenvalue, but its largest is {float(largest):.3g}.\n"
            "  A kernel of zero has nothing to train: look at the activation and the inputs."
        )
    return 2 * n / float(largest)


def posterior(
    kernel: Tensor, cross: Tensor, prior: Tensor, targets: Tensor, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gaussian-process regression.

        mean = K* (K + noise I)^-1 y,    variance = diag(K** - K* (K + noise I)^-1 K*^T)

    Args:
        kernel: `K` of the training inputs, `(n, n)`.
        cross: `K*` of test against training inputs, `(m, n)`.
        prior: `K**` of the test inputs, `(m, m)`, or its diagonal, `(m,)`.
        targets: `y`, `(n,)` or `(n, o)`.
        noise: variance of the observations.

    Returns:
        Mean, of the shape of `targets` with `m` rows, and variance `(m,)`.

    Raises:
        ValueError: if shapes do not match, or `K + noise I` is not positive definite.

    Examples:
        >>> k = torch.eye(2)
        >>> posterior(k, k[:1], torch.ones(1), torch.tensor([3.0, 5.0]))
        (tensor([3.]), tensor([0.]))
    """
    kernel = _square(kernel, "kernel")
    targets = _beside(kernel, "targets", targets)
    y = _columns(targets, len(kernel), "targets")
    noise = checks.number("noise", noise, at_least=0)
    diagonal, cross = _variances(kernel, prior), _beside(kernel, "cross", cross)
    if cross.shape != (len(diagonal), len(kernel)):
        raise ValueError(
            f"cross must have shape ({len(diagonal)}, {len(kernel)}) (test, training) like prior "
            f"and kernel, but has shape {tuple(cross.shape)}.\n"
            "  Compute it with x1 the test and x2 the training inputs."
        )
    noisy = kernel + noise * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(noisy)
    if int(failed):
        raise ValueError(
            f"kernel + noise * I is not positive definite (noise={noise}): two inputs coincide, or "
            "the activation makes the kernel singular.\n  Pass a larger noise."
        )
    mean = cross @ torch.cholesky_solve(y, factor)
    half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
    variance = diagonal - (half * half).sum(0)
    return mean.reshape(len(cross), *targets.shape[1:]), variance


@dataclass(frozen=True)
class GradientDescent:
    """Training a network whose tangent kernel does not change, in closed form.

    With `Theta = Q diag(lambda) Q^T` and `e_0 = f_0 - y`, after `k` steps of learning rate
    `lr` the error is `Q (1 - lr lambda / n)^k Q^T e_0`; gradient flow for a time `t` replaces
    the power by `exp(-lambda t / n)`.

    Args:
        kernel: `Theta` of the training inputs, `(n, n)`.
        targets: `y`, `(n,)` or `(n, o)` (outputs share the kernel: exact at infinite width).
        initial: `f_0`, of the shape of `targets`; None means zero.

    Examples:
        >>> dynamics = GradientDescent(torch.diag(torch.tensor([2.0, 4.0])), torch.ones(2))
        >>> dynamics.outputs(1, lr=0.5)
        tensor([0.5000, 1.0000])

    Reference: Lee et al., Wide Neural Networks of Any Depth Evolve as Linear Models, arXiv
    1902.06720, equations 8 to 11 and 14 to 16.
    """

    kernel: Tensor
    targets: Tensor
    initial: Tensor | None = None
    _values: Tensor = field(init=False, repr=False)
    _vectors: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the shapes and decompose the kernel, once."""
        checks.settle(self, kernel=_square(self.kernel, "kernel"))
        checks.settle(self, targets=_beside(self.kernel, "targets", self.targets))
        _columns(self.targets, len(self.kernel), "targets")
        if self.initial is not None:
            checks.settle(self, initial=_beside(self.kernel, "initial", self.initial))
        if self.initial is not None and self.initial.shape != self.targets.shape:
            raise ValueError(
                f"initial must have the shape of targets, {tuple(self.targets.shape)}, but has "
                f"shape {tuple(self.initial.shape)}.\n"
                "  Give the network's outputs on the training inputs: initial.reshape_as(targets)."
            )
        values, vectors = torch.linalg.eigh(self.kernel)
        checks.settle(self, _values=values, _vectors=vectors)

    def _decay(self, when: float, lr: float | None) -> Tensor:
        rate = self._values / len(self.kernel)
        if lr is None:
            return torch.exp(-rate * checks.number("when", when, at_least=0, infinite=True))
        steps = checks.whole("when", when, at_least=0, hint="With lr it counts steps.")
        return (1 - checks.number("lr", lr, above=0) * rate) ** steps

    def _error(self) -> Tensor:
        start = torch.zeros_like(self.targets) if self.initial is None else self.initial
        return self._vectors.T @ (start - self.targets).reshape(len(self.kernel), -1)

    def outputs(self, when: float, lr: float | None = None) -> Tensor:
        """Outputs on the training inputs.

        Args:
            when: number of steps of gradient descent, or time of gradient flow.
            lr: learning rate; None for gradient flow.
        """
        error = self._vectors @ (self._decay(when, lr)[:, None] * self._error())
        return self.targets + error.reshape(self.targets.shape)

    def loss(self, when: float, lr: float | None = None) -> float:
        """`1/(2n) |f - y|^2`, arguments as for `outputs`."""
        error = self._decay(when, lr)[:, None] * self._error()
        return float((error**2).sum()) / (2 * len(self.kernel))

    def predict(
        self, cross: Tensor, when: float, lr: float | None = None, initial: Tensor | None = None
    ) -> Tensor:
        """Outputs on test inputs: `f_0* - Theta* Theta^-1 (1 - decay) e_0`.

        Args:
            cross: `Theta*` of test against training inputs, `(m, n)`.
            when: as for `outputs`; `inf` (with `lr=None`) for training to the end.
            lr: as for `outputs`.
            initial: `f_0*` on the test inputs; None means zero.
        """
        cross = _cross(self.kernel, cross)
        weights = self._spent(self._decay(when, lr))[:, None] * self._error()
        change = cross @ (self._vectors @ weights)
        out = -change.reshape(len(cross), *self.targets.shape[1:])
        if initial is None:
            return out
        initial = _beside(self.kernel, "initial", initial)
        if initial.shape != out.shape:
            raise ValueError(
                f"initial must have shape {tuple(out.shape)}, an output for each test input, but "
                f"has shape {tuple(initial.shape)}.\n"
                "  Give the network's outputs on the test inputs, before training."
            )
        return initial + out

    def _spent(self, decay: Tensor) -> Tensor:
        """`(1 - decay) / lambda`, zero in directions the kernel does not reach."""
        reached = self._values > len(self.kernel) * torch.finfo(decay.dtype).eps * self._values[-1]
        safe = torch.where(reached, self._values, torch.ones_like(self._values))
        return torch.where(reached, (1 - decay) / safe, torch.zeros_like(decay))

    def ensemble_variance(
        self,
        cross: Tensor,
        nngp: tuple[Tensor, Tensor, Tensor],
        when: float,
        lr: float | None = None,
    ) -> Tensor:
        """Variance of the predictions over random initialisations, `(m,)`.

        Args:
            cross: `Theta*`, `(m, n)`.
            nngp: `(K, K*, K**)`: kernel of the training inputs `(n, n)`, of test against
                training `(m, n)`, and of the test inputs (`(m, m)` or its diagonal).
            when: as for `outputs`.
            lr: as for `outputs`.
        """
        hint = "Write (nngp(x), nngp(x_test, x), nngp(x_test))."
        if not isinstance(nngp, tuple | list) or len(nngp) != 3:
            checks.refuse("nngp", "three kernels (K, K*, K**)", nngp, hint)
        cross = _cross(self.kernel, cross)
        train = _beside(self.kernel, "nngp[0]", nngp[0])
        test_train = _beside(self.kernel, "nngp[1]", nngp[1])
        diagonal = _variances(self.kernel, nngp[2], "nngp[2]")
        wanted = (self.kernel.shape, cross.shape, cross.shape[:1])
        given = (train.shape, test_train.shape, diagonal.shape)
        if given != wanted:
            wanted_words, given_words = (
                ", ".join(str(tuple(x)) for x in shapes) for shapes in (wanted, given)
            )
            raise ValueError(
                f"nngp must fit kernel and cross: shapes {wanted_words} (the last, or its "
                f"diagonal), but they are {given_words}.\n"
                "  Compute all kernels from the same training and test inputs."
            )
        spent = self._spent(self._decay(when, lr))
        gain = cross @ (self._vectors * spent) @ self._vectors.T
        return diagonal - 2 * (gain * test_train).sum(1) + ((gain @ train) * gain).sum(1)

    def max_learning_rate(self) -> float:
        """`2 n / lambda_max`: gradient descent diverges above."""
        return _stable_rate(self._values[-1], len(self.kernel))

    def rate(self) -> float:
        """Slowest decay rate of the loss under gradient flow, `2 lambda_min / n`."""
        return 2 * float(self._values[0]) / len(self.kernel)
