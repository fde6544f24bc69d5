"""Stochastic equations: StochasticDiffEq's steps, on the Brownian path of the torch engine.

Saved times, dense output and gradients are made of the accepted steps, as the torch engine's are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pysciml_node.julia_engine import plans, runtime
from pysciml_node.julia_engine.buffers import address, device_code, doubles, pointer
from pysciml_node.julia_engine.fields import CalledField, Field, native_field
from pysciml_node.julia_engine.forward import RETCODES
from pysciml_node.julia_engine.handles import Handle
from pysciml_node.options import SolveOptions
from pysciml_node.problem import ODEProblem
from pysciml_node.sde_algorithms import StochasticRungeKutta
from pysciml_node.sde_problem import SDEProblem
from pysciml_node.solution import ReturnCode
from pysciml_node.torch_engine.march import Attempt, Step
from pysciml_node.torch_engine.sde.brownian import BrownianPath
from pysciml_node.torch_engine.sde.fields import Fields
from pysciml_node.torch_engine.sde.march import first_size, smallest_step
from pysciml_node.torch_engine.sde.step import Stepper

_RUNNING = -1


@dataclass
class JuliaSteps:
    """Steps that StochasticDiffEq takes; the counterpart of the torch engine's `SDEMarch`.

    Args:
        algorithm: of the solve.
        stepper: the method and the fields in torch.
        problem: what is solved.
        options: step control.
        path: the Brownian motions.
        vector: the state at `t0`.
        slope: drift and diffusion there, where they are known.
    """

    algorithm: StochasticRungeKutta
    stepper: Stepper
    problem: SDEProblem
    options: SolveOptions
    path: BrownianPath
    vector: Tensor
    slope: tuple[Tensor, Tensor] | None = None
    naccept: int = 0
    nreject: int = 0
    retcode: ReturnCode = ReturnCode.Default
    last: Attempt | None = None
    _counted: tuple[int, int] = (0, 0)

    @property
    def evaluations(self) -> tuple[int, int]:
        """Of drift and diffusion, so far."""
        fields = self.stepper.fields
        return fields.nfe + self._counted[0], fields.nfe_diffusion + self._counted[1]

    def __iter__(self) -> Iterator[Step]:
        problem, options = self.problem, self.options
        drift, diffusion = fields_of(self.stepper.fields)
        device = torch.device("cpu") if drift.host or diffusion.host else problem.spec.device
        noise = _Noise(self.stepper, self.path, device)
        walk = self._start(drift, diffusion, noise, device)
        calls = [int(not field.calls_python) for field in (drift, diffusion)]
        stops = {t: i for i, t in enumerate((*options.tstops, problem.t1))}
        report, t, goal = doubles((0.0,) * 5), problem.t0, problem.t1
        while t < goal:
            u1 = torch.empty_like(self.vector, device=device)
            code = runtime.call_released(
                "step_sde!",
                walk.number,
                device_code(device),
                u1.numel(),
                pointer(u1),
                address(report),
                release=False,
            )
            end, error, rejected, *counts = report
            self.nreject = int(rejected)
            self._counted = (calls[0] * int(counts[0]), calls[1] * int(counts[1]))
            if code != _RUNNING:
                self.retcode = RETCODES[code]
                return
            u, self.vector = self.vector, u1.to(problem.spec.device)
            self.naccept += 1
            yield Step(t, end - t, end, u, self.vector, error, stops.get(end), t, end - t)
            t = end
        self.retcode = ReturnCode.Success

    def _start(self, drift: Field, diffusion: Field, noise: _Noise, device: torch.device) -> Handle:
        problem, options, layout = self.problem, self.options, self.stepper.fields.layout
        adaptive = options.controller.adaptive
        proposed, self.slope = first_size(self.stepper, problem, options, self.vector, self.slope)
        proposed = first = min(proposed, options.dtmax, problem.t1 - problem.t0)
        if adaptive and math.isfinite(first):
            first = self.path.aligned(problem.t0, first, down=True) - problem.t0
        limited = replace(options, dtmin=smallest_step(options, self.path, problem))
        plan = plans.stochastic_plan(problem, self.algorithm, limited)
        marks = doubles((problem.t0, *options.tstops, problem.t1))
        start = self.vector.detach().to(device)
        parameters = [field.parameters() for field in (drift, diffusion)]
        made = runtime.call_released(
            "start_sde!",
            drift.handle.number,
            diffusion.handle.number,
            plan.number,
            device_code(device),
            self.algorithm.delta,
            start.numel(),
            pointer(start),
            *(x for p in parameters for x in (p.numel(), pointer(p))),
            len(marks),
            address(marks),
            first,
            proposed,
            noise.w.numel(),
            layout.samples if layout.matrix else 0,
            self.path.length if adaptive else 0.0,
            pointer(noise.w),
            pointer(noise.z),
            noise,
            wrap=Handle,
            release=False,
        )
        handle: Handle = made
        return handle


def fields_of(fields: Fields) -> tuple[Field, Field]:
    """Drift and diffusion as Julia evaluates them.

    Modules are translated and a `JuliaField` is taken as it is, where their values have the state's
    structure; everything else is called back.

    Raises:
        UnsupportedModule: a module has an operation that cannot be translated.
    """
    problem, layout = fields.problem, fields.layout
    parts: list[Field] = []
    for function, called in (
        (problem.drift, fields.drift),
        (problem.diffusion, fields.diffusion),
    ):
        matrix = layout.matrix and called is not fields.drift
        native = None
        if not matrix:
            part = ODEProblem(function, problem.u0, problem.tspan, problem.p)
            native = native_field(part, gradients=False, implicit=False)
        outputs = layout.entries * (layout.motions or 1) if matrix else layout.entries
        parts.append(CalledField(problem, called, outputs, []) if native is None else native)
    return parts[0], parts[1]


class _Noise:
    """Writes the motion over an interval to memory that Julia reads.

    Args:
        stepper: for the layout of the motions.
        path: the motions.
        device: where Julia reads.

    Attributes:
        w: increments.
        z: increments of the motions with `I_(1,0) = h (w + z / 3**0.5) / 2`.
    """

    def __init__(self, stepper: Stepper, path: BrownianPath, device: torch.device) -> None:
        self._layout, self._path = stepper.fields.layout, path
        layout = self._layout
        size = layout.size if layout.matrix else layout.entries
        self.w = torch.empty(size, dtype=path.normals.dtype, device=device)
        self.z = torch.empty_like(self.w)

    def __call__(self, start: float, end: float) -> None:
        motion = self._path.increment(start, end)
        self.w.copy_(self._layout.by_entry(motion.w))
        # I_(1,0) = h (w / 2 + area).
        torch.mul(self._layout.by_entry(motion.area), math.sqrt(12), out=self.z)
