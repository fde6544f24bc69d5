"""The variance-corrected optimizer: steps in units of the terminal state, not of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pysciml_node.errors import SolverFailure
from pysciml_node.optim.gauss_newton import (
    DampedSolve,
    GaussNewton,
    ProductSpace,
    flatten,
    hutchinson_diagonal,
    refuse_unreached,
    set_parameters,
    unflatten,
)
from pysciml_node.optim.options import (
    Curvature,
    JacobianProduct,
    Safeguard,
    check_group,
    check_uniform,
    resolve_defaults,
)
from pysciml_node.optim.terminal import TerminalSolution, terminal_moments, terminal_state

Source: TypeAlias = TerminalSolution | Tensor
Loss: TypeAlias = float | Tensor
Closure: TypeAlias = Callable[[], Loss] | Callable[[], tuple[Tensor, Source]]

_DAMPING_AFTER_REJECTION = 0.1


class _Row(NamedTuple):
    """One group's parameters that have a gradient, with the gradients to descend along."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]


class _Model:
    """Loss and outputs as functions of the values the parameters hold at the time of the call."""

    def __init__(self, closure: Closure, solution: Source, objective: float, sign: float) -> None:
        self.solution = solution
        self.objective = objective
        self._closure = closure
        self._sign = sign

    def objective_here(self) -> float:
        """What is minimized; infinite where the flow cannot be solved."""
        try:
            loss, _ = self._closure()  # type: ignore[misc]
        except SolverFailure:
            return math.inf
        return self._sign * float(loss)

    def outputs_here(self) -> Tensor:
        """Terminal state `(B, n)`."""
        _, solution = self._closure()  # type: ignore[misc]
        return terminal_state(solution)


class VarianceCorrected(Optimizer):
    r"""Gradient descent with the step measured at the end of the flow.

    For `x' = a x`, `L = E|x_t - y|^2 / 2`, the paper's rule is

    .. math:: a \leftarrow a - \eta\, \frac{1}{t^2\, E[x_t^2]}\, \nabla L(a).

    With `u = (a - a*) t` it is exactly `u <- u - eta (1 - exp(-u))`: convergence does not depend
    on horizon, data variance, or `a*`. The scalar is the Gauss-Newton curvature `E[(dx_t/da)^2]`,
    which gives the three forms of `theta <- theta - eta C^{-1} grad`:

    * `"terminal"`: `C = t^2 E|x_t|^2`, one number for all parameters.
    * `"diagonal"`: `C = diag E[(dx_t/dtheta_i)^2]`, estimated with random signs and a running
      average; one vector-Jacobian product a probe.
    * `"gauss-newton"`: the whole matrix `J^T J / B`, inverted by conjugate gradients. The step
      is trusted as far as the loss follows its model (Levenberg-Marquardt).

    All three agree for one parameter and one state. `eta` has its meaning for the loss
    `E|x_t - y|^2 / 2` (sum over the state, mean over the batch); for another multiple of it the
    learning rate is to be divided by that multiple.

    `step` is called in one of two ways. After `loss.backward()`: `step(solution=sol)`
    (`"diagonal"` needs `loss.backward(retain_graph=True)`). Or with a closure that returns
    `(loss, solution)` and does not call backward; `"gauss-newton"` and the backtracking
    safeguard need this form, and call the closure several times. A closure that calls backward and
    returns the loss, as for the other torch optimizers, is accepted where one evaluation is enough.

    For `a0 < a*` a step can overshoot: with `d = exp(|u|) - 1` the loss rises above
    `eta = log(1 + 2 d) / d`. `safeguard` prevents it.

    Args:
        params: parameters or parameter groups.
        lr: `eta`, dimensionless. Default 0.1; 1 is the full step.
        curvature: the form of `C`; see above.
        safeguard: `"none"`; `"bound"` (terminal) caps `lr` at `log(1 + d) / d` with
            `d = |grad| / (t E|x_t|^2)`, which in one dimension is the largest step that does not
            overshoot; `"backtracking"` halves the step until the loss does not rise;
            `"gain-ratio"` (gauss-newton) raises the damping instead. Default `"none"`, for
            gauss-newton `"gain-ratio"`.
        damping: added to `C` in its own units, as a fraction of the mean diagonal (diagonal) or of
            the curvature along the gradient (gauss-newton; with `"gain-ratio"` the value at the
            first step). Default 1e-3. Terminal takes none: its curvature is one number.
        beta: weight of the past in the diagonal's running average, in [0, 1). Default 0.95.
        probes: random signs a step for the diagonal; as many as outputs or more give it exactly.
        jvp: how gauss-newton gets `J v`: `"finite-difference"`, two more solves without a
            gradient, which works with every adjoint and engine; `"double-backward"`, exact, for
            solves with `DirectAdjoint`.
        fd_step: length of the difference relative to `1 + |theta|`; default the fourth root of
            the machine epsilon. Raise it for loose solver tolerances.
        cg_steps: conjugate gradient steps at most, over all trials of a step. Default 20. The
            memory of twice as many gradients is needed.
        cg_rtol: their relative residual. Default 1e-3.
        max_trials: steps tried before the safeguard gives up and leaves the parameters as they
            are. Default 10.
        foreach: update whole lists of tensors at once; default on CUDA only.
        maximize: ascend instead.
        generator: seeds the probes; default the global generator. Only the seed drawn from it
            is kept, so `state_dict` continues the same sequence of probes.

    Raises:
        ValueError: an option is out of its range, or does not go with the curvature; at a step, a
            parameter that the loss depends on and the outputs do not (but for `"terminal"`).

    Example:
        >>> a = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        >>> optimizer = VarianceCorrected([a], lr=0.5)
        >>> x0, t = torch.ones(4, 1, dtype=torch.float64), 2.0
        >>> for _ in range(60):
        ...     x = x0 * torch.exp(a * t)
        ...     optimizer.zero_grad()
        ...     (0.5 * (x - x0 * torch.exp(x0 * 0.3 * t)).square().mean()).backward()
        ...     _ = optimizer.step(solution=x, horizon=t)
        >>> round(a.item(), 6)
        0.3

    Reference: Okamoto, Takeuchi, Sakemi, "Learning the Simplest Neural ODE", arXiv 2505.02019
    (rule and Theorem 1). Damping: Nielsen, IMM-REP-1999-05.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        curvature: Curvature = "terminal",
        safeguard: Safeguard | None = None,
        damping: float | None = None,
        beta: float = 0.95,
        probes: int = 1,
        jvp: JacobianProduct = "finite-difference",
        fd_step: float | None = None,
        cg_steps: int = 20,
        cg_rtol: float = 1e-3,
        max_trials: int = 10,
        foreach: bool | None = None,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "curvature": curvature,
            "safeguard": safeguard,
            "damping": damping,
            "beta": beta,
            "probes": probes,
            "jvp": jvp,
            "fd_step": fd_step,
            "cg_steps": cg_steps,
            "cg_rtol": cg_rtol,
            "max_trials": max_trials,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, resolve_defaults(defaults, generator))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that belong to the joint step must agree with the other groups'.

        Args:
            param_group: `params` and the options in which the group differs.

        Raises:
            ValueError: an option is out of range, or differs where groups must agree.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            check_uniform(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        solution: Source | None = None,
        horizon: float | Tensor | None = None,
        second_moment: float | Tensor | None = None,
    ) -> Loss | None:
        """Take one step.

        Args:
            closure: returns `(loss, solution)` without calling backward; or calls backward and
                returns the loss.
            solution: the solution the present gradients came from, or any outputs `(B, *D)`.
                A closure's solution takes precedence.
            horizon: length of the time interval (terminal); default the solution's.
            second_moment: `E|x_t|^2` (terminal); default the mean over the solution's batch.

        Returns:
            The closure's loss before the step; None without a closure.

        Raises:
            ValueError: what the curvature or the safeguard needs was not given.
            TypeError: a gradient is sparse, or the solution has no terminal state.
        """
        loss: Loss | None = None
        model: _Model | None = None
        if closure is not None:
            loss, model = self._evaluate(closure)
        if model is not None:
            solution = model.solution
        rows = self._rows()
        if not rows:
            return loss
        safeguard = self._shared("safeguard")
        match self._shared("curvature"):
            case "gauss-newton":
                self._gauss_newton(rows, self._require(model))
                self._count(rows)
                return loss
            case "terminal":
                moments = terminal_moments(solution, horizon, second_moment)
                directions = self._terminal_directions(rows, *moments)
                cap = self._rate_cap(rows, *moments) if safeguard == "bound" else math.inf
            case _:
                directions = self._diagonal_directions(rows, solution)
                cap = math.inf
        rates = [min(float(row.group["lr"]), cap) for row in rows]
        if safeguard == "backtracking":
            self._backtrack(rows, directions, rates, self._require(model))
        else:
            _move(rows, directions, rates)
        self._count(rows)
        return loss

    def _count(self, rows: list[_Row]) -> None:
        for row in rows:
            for param in row.params:
                self.state[param]["step"] += 1

    def _shared(self, name: str) -> Any:
        return self.param_groups[0][name]

    def _require(self, model: _Model | None) -> _Model:
        if model is None:
            names = ", ".join(
                f"{name}={self._shared(name)!r}" for name in ("curvature", "safeguard")
            )
            msg = (
                f"{names} evaluates loss and solution at several points: pass step() a closure "
                "that returns (loss, solution) and does not call backward"
            )
            raise ValueError(msg)
        return model

    def _evaluate(self, closure: Closure) -> tuple[Loss, _Model | None]:
        with torch.enable_grad():
            result = closure()
            if not isinstance(result, tuple):
                return result, None
            loss, solution = result
            self.zero_grad()
            torch.autograd.backward(loss, retain_graph=self._shared("curvature") != "terminal")
        loss = loss.detach()
        sign = -1.0 if self._shared("maximize") else 1.0
        return loss, _Model(closure, solution, sign * float(loss), sign)

    def _rows(self) -> list[_Row]:
        """Collect parameters with gradients and set up their state."""
        rows: list[_Row] = []
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [param.grad for param in params]
            if any(grad.is_sparse for grad in grads):
                msg = (
                    "VarianceCorrected does not support sparse gradients: a terminal state "
                    "depends on all parameters of its field; set sparse=False on the embedding"
                )
                raise TypeError(msg)
            for param in params:
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    if group["curvature"] == "diagonal":
                        state["curvature"] = torch.zeros_like(param)
                    elif group["curvature"] == "gauss-newton":
                        state["damping"] = param.new_tensor(group["damping"])
            if group["maximize"]:
                grads = [-grad for grad in grads]
            rows.append(_Row(group, params, grads))
        return rows

    @staticmethod
    def _terminal_directions(
        rows: list[_Row], horizon: float, second_moment: float
    ) -> list[list[Tensor]]:
        curvature = horizon * horizon * second_moment
        return [[grad / curvature for grad in row.grads] for row in rows]

    @staticmethod
    def _rate_cap(rows: list[_Row], horizon: float, second_moment: float) -> float:
        """Largest learning rate that does not overshoot in one dimension, `log(1 + d) / d`."""
        total = math.hypot(*(float(grad.norm()) for row in rows for grad in row.grads))
        distance = total / (horizon * second_moment)
        return math.log1p(distance) / distance if distance > 0.0 else math.inf

    def _diagonal_directions(self, rows: list[_Row], solution: Source | None) -> list[list[Tensor]]:
        if solution is None:
            msg = (
                "curvature='diagonal' needs the outputs whose curvature it estimates: pass "
                "solution=sol after loss.backward(retain_graph=True), or a closure that returns "
                "(loss, solution)"
            )
            raise ValueError(msg)
        outputs = terminal_state(solution)
        params = [param for row in rows for param in row.params]
        generator = torch.Generator(device=outputs.device)
        generator.manual_seed(self._shared("seed") + int(self.state[params[0]]["step"]))
        samples = iter(hutchinson_diagonal(outputs, params, self._shared("probes"), generator))
        averages: list[list[Tensor]] = []
        for row in rows:
            beta = row.group["beta"]
            averages.append([])
            for param in row.params:
                state = self.state[param]
                state["curvature"].lerp_(next(samples), 1.0 - beta)
                averages[-1].append(state["curvature"] / (1.0 - beta ** (state["step"].item() + 1)))
        for row, average in zip(rows, averages, strict=True):
            damped = row.group["damping"] > 0
            refuse_unreached(outputs, row.params, row.grads, average, damped=damped)
        entries = sum(param.numel() for param in params)
        mean = math.fsum(float(entry.sum()) for row in averages for entry in row) / entries
        return [
            [
                _quotient(grad, entry + row.group["damping"] * mean)
                for grad, entry in zip(row.grads, average, strict=True)
            ]
            for row, average in zip(rows, averages, strict=True)
        ]

    def _backtrack(
        self, rows: list[_Row], directions: list[list[Tensor]], rates: list[float], model: _Model
    ) -> None:
        for _ in range(self._shared("max_trials")):
            if _objective_after(rows, directions, rates, model) <= model.objective:
                _move(rows, directions, rates)
                return
            rates = [0.5 * rate for rate in rates]

    def _gauss_newton(self, rows: list[_Row], model: _Model) -> None:
        params = [param for row in rows for param in row.params]
        gradient = flatten([grad for row in rows for grad in row.grads])
        exact = self._shared("jvp") == "double-backward"
        fd_step = self._shared("fd_step") or torch.finfo(gradient.dtype).eps ** 0.25
        outputs = terminal_state(model.solution)
        operator = GaussNewton(outputs, params, None if exact else model.outputs_here, fd_step)
        space = ProductSpace(operator, gradient)
        safeguard = self._shared("safeguard")
        rates = [float(row.group["lr"]) for row in rows]
        growth, first = 2.0, True
        for _ in range(self._shared("max_trials")):
            damping = flatten([self.state[param]["damping"].expand_as(param) for param in params])
            solved = space.solve(
                damping, max_steps=self._shared("cg_steps"), rtol=self._shared("cg_rtol")
            )
            if first:
                known = unflatten(space.along_gradient, params)
                refuse_unreached(outputs, params, unflatten(gradient, params), known, damped=True)
                first = False
            pieces = iter(unflatten(solved.step, params))
            directions = [[next(pieces) for _ in row.params] for row in rows]
            if safeguard == "backtracking":
                self._backtrack(rows, directions, rates, model)
                return
            predicted = _predicted_decrease(rows, rates, gradient, solved)
            if safeguard == "none" or predicted == 0.0:
                _move(rows, directions, rates)
                return
            after = _objective_after(rows, directions, rates, model)
            gain = (model.objective - after) / predicted
            if predicted > 0.0 and gain > 0.0:
                _move(rows, directions, rates)
                self._scale_damping(params, max(0.1, 1.0 - (2.0 * gain - 1.0) ** 3))
                return
            self._scale_damping(params, growth, floor=_DAMPING_AFTER_REJECTION)
            growth *= 2.0

    def _scale_damping(self, params: list[Tensor], factor: float, floor: float = 0.0) -> None:
        for param in params:
            self.state[param]["damping"].clamp_(min=floor).mul_(factor)


def _quotient(grad: Tensor, curvature: Tensor) -> Tensor:
    """`grad / curvature`, and no step where no probe has seen any curvature yet."""
    return torch.where(curvature > 0, grad / curvature, torch.zeros_like(grad))


def _predicted_decrease(
    rows: list[_Row], rates: list[float], gradient: Tensor, solved: DampedSolve
) -> float:
    """Decrease of the quadratic model, exact where all groups have one learning rate."""
    sizes = [sum(param.numel() for param in row.params) for row in rows]
    rate = torch.cat([gradient.new_full((n,), r) for n, r in zip(sizes, rates, strict=True)])
    moved = rate * solved.step
    return float(gradient @ moved) - 0.5 * float(moved @ (rate * solved.image))


def _objective_after(
    rows: list[_Row], directions: list[list[Tensor]], rates: list[float], model: _Model
) -> float:
    """Objective at the end of a move that is taken back, whatever happens."""
    params = [param for row in rows for param in row.params]
    start = [param.clone() for param in params]
    moved = [
        torch.add(param, entry, alpha=-rate)
        for row, direction, rate in zip(rows, directions, rates, strict=True)
        for param, entry in zip(row.params, direction, strict=True)
    ]
    try:
        set_parameters(params, moved)
        return model.objective_here()
    finally:
        set_parameters(params, start)


def _move(rows: list[_Row], directions: list[list[Tensor]], rates: list[float]) -> None:
    """`theta <- theta - rate * direction`."""
    for row, direction, rate in zip(rows, directions, rates, strict=True):
        foreach = row.group["foreach"]
        if foreach is None:
            foreach = all(param.is_cuda for param in row.params)
        if foreach:
            torch._foreach_add_(row.params, direction, alpha=-rate)
        else:
            for param, entry in zip(row.params, direction, strict=True):
                param.add_(entry, alpha=-rate)
