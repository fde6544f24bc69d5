"""The variance-corrected optimizer: steps in units of the terminal state, not of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pysciml_node import checks
from pysciml_node.optim.curvatures import RULES, CurvatureRule
from pysciml_node.optim.options import (
    Curvature,
    CurvatureOptions,
    check_group,
    check_uniform,
    resolve_defaults,
)
from pysciml_node.optim.steps import Closure, Loss, Model, Row, Source, Step


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

    All three agree for one parameter and one state. `eta` is meant for the loss `E|x_t - y|^2 / 2`
    (sum over the state, mean over the batch). For a multiple of that loss, divide the learning rate
    by the multiple.

    `step` is called in one of two ways. The first is `step(solution=sol)` after `loss.backward()`;
    `"diagonal"` needs `loss.backward(retain_graph=True)`. The second is a closure that returns
    `(loss, solution)` and does not call backward. `"gauss-newton"` and the backtracking safeguard
    need it, and call it several times. A closure that calls backward and returns the loss, as for
    the other torch optimizers, is accepted where one evaluation is enough.

    For `a0 < a*` a step can overshoot: with `d = exp(|u|) - 1` the loss rises above
    `eta = log(1 + 2 d) / d`. `safeguard` prevents it.

    Args:
        params: parameters or parameter groups.
        lr: `eta`, dimensionless. Default 0.1; 1 is the full step.
        curvature: the form of `C`; see above.
        foreach: update whole lists of tensors at once; default on CUDA only.
        maximize: ascend instead.
        generator: seeds the probes; default the global generator. Only the seed drawn from it
            is kept, so `state_dict` continues the same sequence of probes.

    Keyword Args:
        safeguard (str): `"none"`; `"bound"` (terminal) caps `lr` at `log(1 + d) / d` with
            `d = |grad| / (t E|x_t|^2)`, which in one dimension is the largest step that does not
            overshoot; `"backtracking"` halves the step until the loss does not rise;
            `"gain-ratio"` (gauss-newton) raises the damping instead. Default `"none"`, for
            gauss-newton `"gain-ratio"`.
        damping (float): added to `C` in its own units, as a fraction of the mean diagonal
            (diagonal) or of the curvature along the gradient (gauss-newton; with `"gain-ratio"` the
            value at the first step). Default 1e-3. Terminal takes none: its curvature is one
            number.
        beta (float): weight of the past in the diagonal's running average, in [0, 1). Default 0.95.
        probes (int): random signs a step for the diagonal; as many as outputs or more give it
            exactly.
        jvp (str): how gauss-newton gets `J v`: `"finite-difference"`, two more solves without a
            gradient, which works with every adjoint and engine; `"double-backward"`, exact, for
            solves with `DirectAdjoint`.
        fd_step (float): length of the difference relative to `1 + |theta|`; default the fourth root
            of the machine epsilon. Raise it for loose solver tolerances.
        cg_steps (int): conjugate gradient steps at most, over all trials of a step. Default 20. The
            memory of twice as many gradients is needed.
        cg_rtol (float): their relative residual. Default 1e-3.
        max_trials (int): steps tried before the safeguard gives up and leaves the parameters as
            they are. Default 10.

    Raises:
        ValueError: an option is out of its range, or does not go with the curvature. A step raises
            it, except with `"terminal"`, where the loss depends on a parameter and the outputs do
            not.

    Examples:
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
        foreach: bool | None = None,
        maximize: bool = False,
        generator: torch.Generator | None = None,
        **options: Unpack[CurvatureOptions],
    ) -> None:
        given = {"lr": lr, "curvature": curvature, "foreach": foreach, "maximize": maximize}
        super().__init__(_listed(params), resolve_defaults(given, options, generator))

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
        model: Model | None = None
        if closure is not None:
            checks.function("closure", closure)
            loss, model = self._evaluate(closure)
        if model is not None:
            solution = model.solution
        rows = self._rows()
        if rows:
            self._rule.step(Step(rows, self.state, solution, horizon, second_moment, model))
        for row in rows:
            for param in row.params:
                self.state[param]["step"] += 1
        return loss

    @property
    def _rule(self) -> CurvatureRule:
        return RULES[self.param_groups[0]["curvature"]]

    def _evaluate(self, closure: Closure) -> tuple[Loss, Model | None]:
        with torch.enable_grad():
            result = closure()
            if not isinstance(result, tuple):
                return result, None
            loss, solution = result
            self.zero_grad()
            torch.autograd.backward(loss, retain_graph=self._rule.reads_graph)
        loss = loss.detach()
        sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
        return loss, Model(closure, solution, sign * float(loss), sign)

    def _rows(self) -> list[Row]:
        """Collect parameters with gradients and set up their state."""
        rows: list[Row] = []
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [param.grad for param in params]
            if any(grad.is_sparse for grad in grads):
                raise TypeError(
                    "gradients must be dense, but one is sparse: a terminal state depends on all "
                    "parameters of its field.\n  Set sparse=False on the embedding."
                )
            for param in params:
                if not self.state[param]:
                    kept = self._rule.new_state(param, group)
                    self.state[param] = {"step": torch.tensor(0.0), **kept}
            if group["maximize"]:
                grads = [-grad for grad in grads]
            rows.append(Row(group, params, grads))
        return rows


def _listed(params: ParamsT) -> ParamsT:
    """At least one parameter, or group of them.

    Raises:
        TypeError: `params` is something else.
        ValueError: it is empty.
    """
    alone = isinstance(params, Tensor) or getattr(params, "ndim", 1) == 0
    if alone or not isinstance(params, Iterable):
        hint = "Write model.parameters()."
        checks.refuse("params", "the parameters of a model, or groups of them", params, hint)
    listed: list[Any] = list(params)
    for i, entry in enumerate(listed):
        if not isinstance(entry, Tensor | dict | tuple):
            hint = 'A group is {"params": [...], "lr": ...}.'
            checks.refuse(f"params[{i}]", "a parameter, or a group of them", entry, hint)
    if not listed:
        raise ValueError(
            "params is empty: there is nothing to optimize.\n"
            "  A field that is a function owns no parameters: write it as an nn.Module, or pass "
            "those of the modules that it uses."
        )
    return listed
