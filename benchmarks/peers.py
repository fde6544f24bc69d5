"""One adapter for each solver: the same field, weights, method, tolerances and outputs.

Every adapter is a function of a workload that returns a `Candidate`, or raises `Unavailable`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import torch
from fields import FlowField
from torch import Tensor
from workloads import Workload

INSTALL = 'pip install -e ".[benchmarks]"'


class Unavailable(Exception):
    """A solver that cannot run here, with the reason."""


@dataclass
class Candidate:
    """A solver made ready for one workload.

    Attributes:
        forward: solve without gradients; returns when done.
        gradient: solve, and differentiate `sum(cotangent * outputs)`.
        outputs: outputs after the initial value, `(T - 1, B, D)`.
        gradients: of `u0`, then of the parameters.
        nfe: evaluations of one forward solve.
        nfe_backward: evaluations (with their pullbacks) of the backward pass, where there are any.
    """

    forward: Callable[[], object]
    gradient: Callable[[], object]
    outputs: Tensor
    gradients: list[Tensor]
    nfe: int
    nfe_backward: int = 0


def _load(*names: str) -> tuple[Any, ...]:
    try:
        return tuple(importlib.import_module(name) for name in names)
    except ImportError as error:
        raise Unavailable(f"{error}; install with: {INSTALL}") from None


class _Counter:
    """Counts the calls of a module while it is entered."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.calls = module, 0

    def _count(self, *_: object) -> None:
        self.calls += 1

    def __enter__(self) -> _Counter:
        self._handle = self.module.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _torch_candidate(
    workload: Workload,
    solve: Callable[[Tensor], Tensor],
    counts: tuple[int, int] | None = None,
) -> Candidate:
    """A candidate from `solve(u0)`, which returns the outputs after the initial value.

    Args:
        workload: what is solved.
        solve: the solver.
        counts: evaluations forward and backward; default: counted by a hook on the field.
    """
    u0 = workload.u0.clone().requires_grad_()
    leaves = [u0, *workload.parameters]

    def forward() -> Tensor:
        with torch.no_grad():
            return solve(workload.u0)

    def gradient() -> list[Tensor]:
        loss = (solve(u0) * workload.cotangent).sum()
        return list(torch.autograd.grad(loss, leaves))

    if counts is None:
        with _Counter(workload.field) as counter:
            outputs = forward()
            nfe = counter.calls
            gradients = gradient()
        counts = nfe, counter.calls - 2 * nfe
    else:
        outputs, gradients = forward(), gradient()
    return Candidate(forward, gradient, outputs, gradients, *counts)


def _pysciml(workload: Workload, **options: Any) -> tuple[Any, Callable[[Tensor], Any]]:
    (psn,) = _load("pysciml_node")
    options.setdefault("adjoint", psn.DiscreteAdjoint())
    if isinstance(workload.field, FlowField):
        return psn, _flow(psn, workload, workload.field, options)
    algorithm, controller = options.pop("method", (psn.DP5(), psn.IController()))

    def solve(u0: Tensor) -> Any:
        problem = psn.ODEProblem(workload.field, u0, (workload.times[0], workload.times[-1]))
        return psn.solve(
            problem,
            algorithm,
            rtol=workload.tolerance,
            atol=workload.tolerance,
            controller=controller,
            saveat=workload.times[1:],
            **options,
        )

    return psn, solve


def _flow(
    psn: Any, workload: Workload, field: FlowField, options: dict[str, Any]
) -> Callable[[Tensor], Any]:
    """A flow's solve by this package's own `CNF`."""
    flow = psn.CNF(
        field.inner,
        psn.DP5(),
        (workload.times[0], workload.times[-1]),
        exact=True,
        rtol=workload.tolerance,
        atol=workload.tolerance,
        controller=psn.IController(),
        **options,
    )
    solved: list[Any] = []
    flow.node.register_solve_hook(lambda layer, solution: solved.append(solution))

    def solve(u0: Tensor) -> Any:
        solved.clear()
        mapped = flow.transform(u0[:, :2])
        end = torch.cat([mapped.u, (u0[:, 2] + mapped.log_det)[:, None]], 1)
        return SimpleNamespace(u=end[None], stats=solved[0].stats)

    return solve


def pysciml_eager(workload: Workload) -> Candidate:
    """This package, torch engine, discrete adjoint."""
    _, solve = _pysciml(workload, engine="torch")
    return _by_statistics(workload, solve)


def pysciml_direct(workload: Workload) -> Candidate:
    """This package, torch engine, every operation recorded."""
    (psn,) = _load("pysciml_node")
    _, solve = _pysciml(workload, engine="torch", adjoint=psn.DirectAdjoint())
    return _by_statistics(workload, solve)


def _python_calls(run: Callable[[], object], code: CodeType) -> int:
    """How often the interpreter enters `code` during `run`."""
    calls = 0

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code is code

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def _by_statistics(workload: Workload, solve: Callable[[Tensor], Any]) -> Candidate:
    """A candidate whose evaluations only the solver itself can count."""
    solution = solve(workload.u0.clone().requires_grad_())
    torch.autograd.grad((solution.u * workload.cotangent).sum(), workload.parameters)
    counts = solution.stats.nfe, solution.stats.nfe_backward
    return _torch_candidate(workload, lambda u0: solve(u0).u, counts)


def pysciml_native(workload: Workload) -> Candidate:
    """This package, native code with its discrete adjoint."""
    psn, solve = _pysciml(workload, engine="torch", compile=True)
    try:
        candidate = _by_statistics(workload, solve)
    except psn.CompileError as reason:
        raise Unavailable(str(reason).replace("\n", " ")) from None
    field = workload.field.inner if isinstance(workload.field, FlowField) else workload.field
    if _python_calls(candidate.forward, type(field).forward.__code__):
        raise Unavailable("compile=True ran the field in Python")
    return candidate


def pysciml_implicit(workload: Workload) -> Candidate:
    """This package, torch engine, an implicit method with its discrete adjoint."""
    return _by_statistics(workload, _rodas(workload, compile=False))


def pysciml_native_implicit(workload: Workload) -> Candidate:
    """The same as native code."""
    return _by_statistics(workload, _rodas(workload, compile=True))


def _rodas(workload: Workload, compile: bool) -> Callable[[Tensor], Any]:
    (psn,) = _load("pysciml_node")
    _stiff(workload)
    method = psn.Rodas5P(), psn.PIController()
    return _pysciml(workload, engine="torch", method=method, compile=compile)[1]


def _stiff(workload: Workload) -> None:
    if not workload.stiff:
        raise Unavailable("an implicit method, for stiff equations")


def pysciml_julia(workload: Workload) -> Candidate:
    """This package, Julia engine, its default adjoint."""
    psn, solve = _pysciml(workload, engine="julia", adjoint=None)
    try:
        return _by_statistics(workload, solve)
    except psn.EngineUnavailable as reason:
        raise Unavailable(str(reason).replace("\n", " ")) from None


def _torchdiffeq(workload: Workload, function: str) -> Candidate:
    (package,) = _load("torchdiffeq")
    odeint = getattr(package, function)
    times, tolerance = torch.tensor(workload.times, dtype=workload.u0.dtype), workload.tolerance

    def solve(u0: Tensor) -> Tensor:
        path: Tensor = odeint(
            workload.field, u0, times, rtol=tolerance, atol=tolerance, method="dopri5"
        )
        return path[1:]

    return _torch_candidate(workload, solve)


def torchdiffeq_odeint(workload: Workload) -> Candidate:
    """torchdiffeq, autograd through the loop."""
    return _torchdiffeq(workload, "odeint")


def torchdiffeq_adjoint(workload: Workload) -> Candidate:
    """torchdiffeq, its continuous (backsolve) adjoint."""
    if workload.stiff:
        raise Unavailable("backward in time a stiff equation grows as fast as it decays")
    return _torchdiffeq(workload, "odeint_adjoint")


def torchode_autograd(workload: Workload) -> Candidate:
    """torchode, autograd through the loop; it controls the step of every sample apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (to,) = _load("torchode")
    term = to.ODETerm(workload.field)
    controller = to.IntegralController(workload.tolerance, workload.tolerance, term=term)
    solver = to.AutoDiffAdjoint(to.Dopri5(term), controller)
    times = torch.tensor(workload.times, dtype=workload.u0.dtype)
    times = times.expand(workload.u0.shape[0], -1)

    def solve(u0: Tensor) -> Tensor:
        outputs: Tensor = solver.solve(to.InitialValueProblem(y0=u0, t_eval=times)).ys
        return outputs[:, 1:].transpose(0, 1)

    return _torch_candidate(workload, solve)


def diffrax_jit(workload: Workload) -> Candidate:
    """diffrax, the whole solve under jit, its default (recursive checkpointing) adjoint."""
    return _diffrax(workload, "Dopri5")


def diffrax_implicit(workload: Workload) -> Candidate:
    """diffrax, an implicit method."""
    _stiff(workload)
    return _diffrax(workload, "Kvaerno5")


def _diffrax(workload: Workload, method: str) -> Candidate:
    jax, jnp, dfx = _load("jax", "jax.numpy", "diffrax")
    jax.config.update("jax_enable_x64", workload.u0.dtype == torch.float64)
    field = workload.field.twin(jax)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    def counted(t: Any, y: Any, p: Any) -> Any:
        jax.debug.callback(count)
        return field(t, y, p)

    def outputs_of(f: Any, u0: Any, p: Any) -> Any:
        solution = dfx.diffeqsolve(
            dfx.ODETerm(f),
            getattr(dfx, method)(),
            t0=workload.times[0],
            t1=workload.times[-1],
            dt0=None,
            y0=u0,
            args=p,
            saveat=dfx.SaveAt(ts=jnp.asarray(workload.times[1:], dtype=u0.dtype)),
            stepsize_controller=dfx.PIDController(rtol=workload.tolerance, atol=workload.tolerance),
        )
        return solution.ys

    cotangent = jnp.asarray(workload.cotangent.numpy())
    u0 = jnp.asarray(workload.u0.numpy())
    p = [jnp.asarray(x.detach().numpy()) for x in workload.parameters]
    solve = jax.jit(lambda u0, p: outputs_of(field, u0, p))
    pull = jax.jit(
        jax.grad(lambda u0, p: (outputs_of(field, u0, p) * cotangent).sum(), argnums=(0, 1))
    )
    jax.block_until_ready(jax.jit(lambda u0, p: outputs_of(counted, u0, p))(u0, p))
    jax.effects_barrier()
    du0, dp = pull(u0, p)
    return Candidate(
        forward=lambda: jax.block_until_ready(solve(u0, p)),
        gradient=lambda: jax.block_until_ready(pull(u0, p)),
        outputs=torch.tensor(jax.device_get(solve(u0, p))),
        gradients=[torch.tensor(x) for x in jax.device_get([du0, *dp])],
        nfe=calls,
    )


CANDIDATES: dict[str, Callable[[Workload], Candidate]] = {
    "pysciml_node": pysciml_eager,
    "pysciml_node direct": pysciml_direct,
    "pysciml_node native": pysciml_native,
    "pysciml_node julia": pysciml_julia,
    "torchdiffeq": torchdiffeq_odeint,
    "torchdiffeq adjoint": torchdiffeq_adjoint,
    "torchode": torchode_autograd,
    "diffrax": diffrax_jit,
    "pysciml_node Rodas5P": pysciml_implicit,
    "pysciml_node Rodas5P native": pysciml_native_implicit,
    "diffrax Kvaerno5": diffrax_implicit,
}
PACKAGES = ("pysciml_node", "torch", "torchdiffeq", "torchode", "diffrax", "jax", "jaxlib", "numpy")
