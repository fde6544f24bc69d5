"""Stochastic equations: StochasticDiffEq's steps, on the Brownian path of the torch engine.

Saved times, dense output and gradients are made of the accepted steps, as the torch engine's are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.called import CalledField
from pysciml_node.julia_engine.fields import Field, native_field
from pysciml_node.julia_engine.forward import RETCODES
from pysciml_node.julia_engine.process.buffers import CODES, device_code, doubles
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.loop import Steps
from pysciml_node.steps.step import Step
from pysciml_node.stochastic.adjoints import Pullback
from pysciml_node.stochastic.fields import DifferentiableFields, Fields, NoiseLayout
from pysciml_node.stochastic.march import Start
from pysciml_node.stochastic.solve import Parts
from pysciml_node.stochastic.step import Stepper
from pysciml_node.stochastic.virtual_tree import Increment

_RUNNING = -1


class JuliaParts(Parts):
    """What this engine has of its own of a stochastic solve.

    Args:
        algorithm: of the solve.
    """

    watches = False
    keeps = False

    def __init__(self, algorithm: StochasticRungeKutta) -> None:
        self._algorithm = algorithm
        self._gradients = torch.is_grad_enabled()
        self._fields: tuple[Field, Field]

    @override
    def steps(self, start: Start) -> JuliaSteps:
        self._fields = fields_of(start.stepper.fields, self._gradients)
        return JuliaSteps(start, self._algorithm, *self._fields)

    @override
    def pullback(self, prepared: DifferentiableFields, stepper: Stepper) -> Pullback:
        # A field that is called back is differentiated where it lives.
        if any(field.calls_python for field in self._fields):
            return super().pullback(prepared, stepper)
        return JuliaPullback(*self._fields, prepared.inputs, stepper)


class JuliaSteps(Steps):
    """Steps that StochasticDiffEq takes.

    Args:
        start: what they begin from.
        algorithm: of the solve.
        drift: in Julia.
        diffusion: in Julia.
    """

    def __init__(
        self, start: Start, algorithm: StochasticRungeKutta, drift: Field, diffusion: Field
    ) -> None:
        super().__init__(start.vector)
        self.start = start
        self.algorithm, self.drift, self.diffusion = algorithm, drift, diffusion
        self._counted = (0, 0)

    def _count(self, drifts: int, diffusions: int) -> None:
        """Count what Julia has evaluated so far; what is called back has been counted in torch."""
        fields, before = self.start.stepper.fields, self._counted
        if not self.drift.calls_python:
            fields.drift.nfe += drifts - before[0]
        if not self.diffusion.calls_python:
            fields.nfe_diffusion += diffusions - before[1]
        self._counted = drifts, diffusions

    @override
    def __iter__(self) -> Iterator[Step]:
        problem, options = self.start.problem, self.start.options
        both = self.drift, self.diffusion
        device = torch.device("cpu") if any(f.host for f in both) else problem.spec.device
        proposed, _ = self.start.first_size()
        if not math.isfinite(proposed):
            self.retcode = ReturnCode.Unstable
            return
        walk = self._start(min(proposed, options.dtmax), device)
        stops = {t: i for i, t in enumerate((*options.tstops, problem.t1))}
        report, t = doubles((0.0,) * 5), problem.t0
        while t < problem.t1:
            u1 = torch.empty_like(self.u, device=device)
            code = enter(
                "step_sde!",
                walk=walk,
                device=device_code(device),
                n=u1.numel(),
                u=u1,
                report=report,
                release=False,
            )
            end, error, rejected, drifts, diffusions = report
            self.nreject = int(rejected)
            self._count(int(drifts), int(diffusions))
            if code != _RUNNING:
                self.retcode = RETCODES[code]
                # No step is small enough for a field that is not finite.
                if self.retcode is ReturnCode.DtLessThanMin and not math.isfinite(error):
                    self.retcode = ReturnCode.Unstable
                return
            u, self.u = self.u, u1.to(problem.spec.device)
            self.naccept += 1
            yield Step(t, end - t, end, u, self.u, error, stops.get(end), t, end - t)
            t = end
        self.retcode = ReturnCode.Success

    def _start(self, proposed: float, device: torch.device) -> Handle:
        """Get ready in Julia.

        Args:
            proposed: size that the first step should have.
            device: where Julia has the state.
        """
        given, path = self.start, self.start.path
        problem, options, layout = given.problem, given.options, given.stepper.fields.layout
        adaptive = options.controller.adaptive
        first = min(proposed, problem.t1 - problem.t0)
        if adaptive:
            end = path.aligned(problem.t0, first, down=proposed == options.dtmax)
            first = min(end, problem.t1) - problem.t0
        noise = _Noise(layout, problem.spec.dtype, device)
        marks = doubles((problem.t0, *options.tstops, problem.t1))
        start = self.u.detach().to(device)
        parameters = [field.parameters().to(device) for field in (self.drift, self.diffusion)]
        handle: Handle = enter(
            "start_sde!",
            drift=self.drift.handle,
            diffusion=self.diffusion.handle,
            plan=plans.stochastic_plan(problem, self.algorithm, options),
            device=device_code(device),
            delta=self.algorithm.delta,
            n=start.numel(),
            u0=start,
            nf=parameters[0].numel(),
            pf=parameters[0],
            ng=parameters[1].numel(),
            pg=parameters[1],
            nmarks=len(marks),
            marks=marks,
            dt0=first,
            proposed=proposed,
            dtmin=given.smallest,
            motions=noise.w.numel(),
            samples=layout.samples if layout.matrix else 0,
            length=path.length if adaptive else 0.0,
            w=noise.w,
            z=noise.z,
            noise=lambda start, end: noise.write(path.increment(start, end)),
            wrap=Handle,
            release=False,
        )
        return handle


def fields_of(fields: Fields, gradients: bool) -> tuple[Field, Field]:
    """Drift and diffusion as Julia evaluates them.

    Modules are translated and a `JuliaField` is taken as it is, where their values have the state's
    structure; everything else is called back.

    Args:
        fields: both in torch.
        gradients: whether their inputs will receive gradients.

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
            native = native_field(part, gradients, implicit=False)
        outputs = layout.entries * (layout.motions or 1) if matrix else layout.entries
        parts.append(CalledField(problem, called, outputs, []) if native is None else native)
    return parts[0], parts[1]


class _Noise:
    """Memory from which Julia reads the motion over an interval.

    Args:
        layout: of the motions.
        dtype: of the state.
        device: where Julia reads.

    Attributes:
        w: increments.
        z: increments of the motions with `I_(1,0) = h (w + z / 3**0.5) / 2`.
    """

    def __init__(self, layout: NoiseLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        size = layout.size if layout.matrix else layout.entries
        self.w = torch.empty(size, dtype=dtype, device=device)
        self.z = torch.empty_like(self.w)

    def write(self, motion: Increment) -> None:
        """Put a motion there."""
        self.w.copy_(self._layout.by_entry(motion.w))
        assert motion.area is not None
        # I_(1,0) = h (w / 2 + area).
        self.z.copy_(self._layout.by_entry(motion.area)).mul_(math.sqrt(12))


class JuliaPullback(Pullback):
    """The discrete adjoint of single steps in Julia, by the fields' own vector-Jacobian products.

    Args:
        drift: in Julia.
        diffusion: in Julia.
        inputs: tensors that receive gradients, in the order that the solve knows them by.
        stepper: the method and the fields in torch.

    Attributes:
        evaluations: of the drift.
    """

    def __init__(
        self, drift: Field, diffusion: Field, inputs: list[Tensor], stepper: Stepper
    ) -> None:
        spec = stepper.fields.problem.spec
        self._fields, self._inputs, self._device = (drift, diffusion), inputs, spec.device
        self._noise = _Noise(stepper.fields.layout, spec.dtype, spec.device)
        self._parameters = [field.parameters() for field in self._fields]
        self._sums = [torch.zeros_like(p) for p in self._parameters]
        self._stages = sum(s is not None for s in stepper.method.needed[0])
        self.evaluations = 0
        (pf, pg), (pfbar, pgbar) = self._parameters, self._sums
        self._handle = Handle(
            enter(
                "make_sde_pullback",
                drift=drift.handle,
                diffusion=diffusion.handle,
                method=plans.stochastic_method(stepper.method),
                dtype=CODES[spec.dtype],
                device=device_code(spec.device),
                n=sum(spec.sizes),
                nf=pf.numel(),
                pf=pf,
                pfbar=pfbar,
                ng=pg.numel(),
                pg=pg,
                pgbar=pgbar,
                w=self._noise.w,
                z=self._noise.z,
            )
        )

    @override
    def __call__(
        self,
        t: float,
        start: Tensor,
        motion: Increment,
        upon: Tensor,
        recorded: Tensor | None = None,
    ) -> Tensor:
        self._noise.write(motion)
        u = start.detach().contiguous()
        bar = upon.clone(memory_format=torch.contiguous_format)
        enter(
            "pull_sde!",
            pullback=self._handle,
            device=device_code(self._device),
            n=u.numel(),
            t=t,
            h=motion.h,
            u=u,
            ubar=bar,
        )
        self.evaluations += self._stages
        return bar

    @override
    def inputs(self) -> list[Tensor | None]:
        gradients: dict[int, Tensor] = {}
        for field, total in zip(self._fields, self._sums, strict=True):
            for x, part in zip(field.inputs, field.split(total), strict=True):
                if part is not None:
                    gradients[id(x)] = gradients[id(x)] + part if id(x) in gradients else part
        return [gradients.get(id(x)) for x in self._inputs]
