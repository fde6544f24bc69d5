"""Whether a program is its module: both are evaluated and differentiated by torch at one point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.graph import nodes_behind
from pysciml_node.translation.outside import outside
from pysciml_node.translation.program import Program

_TOLERANCE = {torch.float64: 2e-7, torch.float32: 1e-3}
"""Relative; far above rounding, far below any other difference.

Torch rounds some slopes to single precision in any dtype: 1/6 of `hardsigmoid`, 1/alpha of `celu`.
"""

_ROUNDINGS = 100.0
"""Rounding may exceed the effect of one disturbed evaluation by this factor."""

_ROUNDED = 1e-12
"""What a number that is a tensor may change in double precision: its powers are rounded."""

_SCALES = (1.0, 0.01, 100.0)
"""Of the random state."""

_ANOTHER = -0.5
"""Of another state, at another time: what a field has kept of the first one it shows there."""


def check_program(
    field: Callable[[Tensor, Any], Tensor],
    name: str,
    spec: StateSpec,
    program: Program,
    p: list[Tensor],
) -> None:
    """Compare value and derivatives at a random state, or at several where the field chooses.

    They differ for a `forward` whose derivative in torch is not that of its operations: functions
    with a `backward` of their own, or derivatives taken inside without `create_graph`. Where terms
    cancel, rounding alone makes a difference. A second evaluation, in which each operation is
    disturbed by a rounding error, shows how large that is.

    Args:
        field: the vector field, or a condition, as a function of time and state with a flat result.
        name: of the field in messages.
        spec: structure of the state.
        program: the field's translation.
        p: the tensors that make up the program's parameter vector.

    Raises:
        UnsupportedModule: they differ, or torch cannot differentiate the module.
    """
    for scale in (*_scales(program), _ANOTHER):
        _check_at(scale, field, name, spec, program, p)


def has_values(
    field: Callable[[Tensor, Any], Tensor], spec: StateSpec, program: Program, p: list[Tensor]
) -> bool:
    """Whether a program has the values of its field, with other numbers than it was checked with.

    Args:
        field: as for `check_program`.
        spec: structure of the state.
        program: the field's translation.
        p: the tensors that make up the program's parameter vector.
    """
    nothing = torch.empty(0, dtype=spec.dtype, device=spec.device)
    flat = torch.cat([nothing, *(x.reshape(-1).to(nothing) for x in p)])
    for scale in _scales(program):
        t, u, _, generator = point(scale, spec)
        expected = field(t, spec.unflatten(u))
        value = _value(spec, program, t, u, flat)
        if not _is_close(value, expected, value, spec.dtype):
            disturbed = _value(spec, program, t, u, flat, generator)
            if not _is_close(value, expected, disturbed, spec.dtype):
                return False
    return True


def have_same_values(
    one: Callable[[Tensor, Any], Tensor],
    other: Callable[[Tensor, Any], Tensor],
    spec: StateSpec,
    program: Program,
) -> bool:
    """Whether a field has the same values in two forms, to rounding in the state's precision.

    Args:
        one: the field, as for `check_program`.
        other: the same in another form.
        spec: structure of the state.
        program: a translation of the field.
    """
    for scale in _scales(program):
        t, u, _, _ = point(scale, spec)
        a, b = (f(t, spec.unflatten(u)) for f in (one, other))
        atol = _ROUNDED * _largest(a)
        if not torch.allclose(a, b, rtol=_ROUNDED, atol=atol, equal_nan=True):
            return False
    return True


def _scales(program: Program) -> tuple[float, ...]:
    """Of the states that a program is looked at: what a choice hides at one it shows at another."""
    return _SCALES if program.jumps else _SCALES[:1]


def point(scale: float, spec: StateSpec) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """A time, a random state, a cotangent of it, and what draws further numbers."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn((2, sum(spec.sizes)), generator=generator, dtype=spec.dtype).to(spec.device)
    time = 0.6180339887 if scale > 0 else 0.3819660113
    t = torch.tensor(time, dtype=spec.dtype, device=spec.device)
    return t, u * scale, v, generator


def _value(
    spec: StateSpec,
    program: Program,
    t: Tensor,
    u: Tensor,
    p: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What a program computes, with each operation disturbed where there is a generator."""
    state = list(spec.parts(spec.unflatten(u)))

    def rounded(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        return x * (1 + torch.finfo(spec.dtype).eps * signs)

    parts = program.evaluate(t, state, p, None if generator is None else rounded)
    return torch.cat([part.reshape(-1) for part in parts])


def _is_close(part: Tensor, target: Tensor, disturbed: Tensor, dtype: torch.dtype) -> bool:
    bound = _TOLERANCE.get(dtype, 1e-1)
    atol = bound * _largest(target) + _ROUNDINGS * _largest(disturbed - part)
    return torch.allclose(part, target, rtol=bound, atol=atol, equal_nan=True)


def _check_at(
    scale: float,
    field: Callable[[Tensor, Any], Tensor],
    name: str,
    spec: StateSpec,
    program: Program,
    p: list[Tensor],
) -> None:
    t, u, v, generator = point(scale, spec)
    with torch.enable_grad():
        inputs = [u.requires_grad_(), t.requires_grad_(), *(x for x in p if x.requires_grad)]
        flat = torch.cat([u.new_empty(0), *(x.reshape(-1).to(u) for x in p)])
        try:
            with outside() as asked:
                expected = field(t, spec.unflatten(u))
        except IndexError as error:
            raise UnsupportedModule(
                f"{name} asks for an entry that is not there ({error}) at the random state by "
                "which its program is checked; clamp the places that it computes."
            ) from error
        if asked:
            raise UnsupportedModule(
                f"{name} calls {asked[0]}(), whose answer may differ at each solve."
            )
        _expect_trained(name, expected, [u, t, *p])
        value, disturbed = (
            _value(spec, program, t, u, flat, disturbing) for disturbing in (None, generator)
        )
        try:
            bar = v[: len(expected)]
            if len(expected) > len(v):  # of a diffusion, which has entries for each motion
                bar = torch.randn(len(expected), generator=generator, dtype=u.dtype).to(u.device)
            pulled = [_pull(x, inputs, bar) for x in (value, disturbed, expected)]
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedModule(
                f"{name} cannot be differentiated by torch: {reason}"
            ) from error
    computed, disturbed_parts, wanted = (
        [x, *y] for x, y in zip((value, disturbed, expected), pulled, strict=True)
    )
    for part, disturbed_part, target in zip(computed, disturbed_parts, wanted, strict=True):
        if not _is_close(part, target, disturbed_part, spec.dtype):
            difference = "another value" if target is expected else "another derivative"
            raise UnsupportedModule(
                f"{name} has {difference} in torch than its operations have; functions "
                "with a backward of their own, derivatives taken inside without create_graph, and "
                "what is kept of an earlier state or time cannot be translated."
            )


def _expect_trained(name: str, out: Tensor, known: list[Tensor]) -> None:
    """Refuse a field that trains a tensor which its program does not read, and holds for numbers.

    Such tensors stand where they are not seen: in an iterator, in an object of another library.
    """
    for node in nodes_behind([out.grad_fn], {x.grad_fn for x in known}):
        if node.name() != "torch::autograd::AccumulateGrad":
            continue
        if not any(node.variable is x for x in known):
            raise UnsupportedModule(
                f"{name} trains a tensor of shape {tuple(node.variable.shape)} that is found in "
                "none of its attributes, closures or globals, or is made in the field, as by "
                "u.detach().requires_grad_().",
                captured=True,
            )


def _largest(x: Tensor) -> float:
    return float(x.detach().nan_to_num(posinf=0, neginf=0).abs().max()) if x.numel() else 0.0


def _pull(out: Tensor, inputs: list[Tensor], v: Tensor) -> list[Tensor]:
    if not out.requires_grad:
        return [torch.zeros_like(x).reshape(-1) for x in inputs]
    gradients = torch.autograd.grad(
        out, inputs, v, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return [gradient.reshape(-1) for gradient in gradients]
