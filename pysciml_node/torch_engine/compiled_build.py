"""Building compiled solves: whether it can be done here, and what to say where it cannot."""

from __future__ import annotations

import functools
import os
import subprocess
import sysconfig
import tempfile
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Graph = Callable[..., Any]


class CompileError(RuntimeError):
    """The field cannot be compiled. The message names the cause; `compile=False` always works."""


@functools.cache
def compiler_available() -> tuple[bool, str]:
    """Whether compiled solves can be built on this machine's CPU.

    Returns:
        `(True, the compiler)` or `(False, the reason)`. The first call builds an empty library
        with it; later calls remember the answer.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return False, f"no C++ compiler was found: {reason[0]}"
    include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(include, "Python.h")):
        return False, f"Python's headers are missing: there is no Python.h in {include}"
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w", encoding="utf-8") as file:
            file.write('#include <cmath>\nextern "C" double probe(double x) { return x; }\n')
        command = [compiler, "-std=c++17", "-shared", "-fPIC", source]
        try:
            run = subprocess.run(
                [*command, "-o", os.path.join(folder, "probe.so")],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return False, f"the C++ compiler {compiler} does not run: {error}"
    if run.returncode != 0:
        return False, f"the C++ compiler {compiler} fails: {run.stderr.strip()[:300]}"
    return True, compiler


def build(function: Callable[..., Any], device: torch.device) -> Graph:
    """Compile a function of tensors into one graph, when it is first called.

    Compiled graphs are kept by code object. A code object of its own keeps the graphs of one
    solver from being searched, counted and thrown out with those of the others.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    # On a CPU a wrapper in C++ takes the loop itself out of Python.
    options: dict[str, Any] = {"cpp_wrapper": True} if device.type == "cpu" else {}
    # `dynamic=False`: shapes seen in other solvers must not make this one's dynamic.
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def run(graph: Graph, *arguments: Any) -> Any:
    """Call a graph; what goes wrong while it is compiled becomes a `CompileError`."""
    try:
        return graph(*arguments)
    except Exception as error:
        kinds = ("torch._dynamo", "torch._inductor", "torch.fx")
        if not type(error).__module__.startswith(kinds):
            raise
        raise CompileError(
            f"the solve cannot be compiled: {_cause(error)}\n"
            "  Control flow that depends on the values of tensors, printing, and calls that leave "
            "PyTorch do not compile.\n"
            "  Rewrite them in the field (torch.where), or solve with compile=False."
        ) from error


def _cause(error: Exception) -> str:
    """The line of a compiler's message that explains most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Explanation:", "RuntimeError:"))]
    return (told or lines or [type(error).__name__])[0].removeprefix("Explanation: ")


def check_field(field: Any, t: Tensor, u: Tensor, leaves: list[Tensor], call: Graph) -> None:
    """Evaluate a field once, to find what a compiled solve could not treat rightly.

    Args:
        field: the field.
        t: a time.
        u: a state.
        leaves: the tensors of `p`.
        call: `(t, u, leaves) -> derivative`.

    Raises:
        CompileError: the field captures tensors that require gradients.
        TypeError: its output is not a tensor of the state's dtype.
        ValueError: its output has another shape than the state.
    """
    with torch.enable_grad():
        state = u.detach().requires_grad_()
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in leaves]
        out = call(t, state, inputs)
    if not isinstance(out, Tensor) or out.dtype != u.dtype:
        given = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"the field must return a tensor of dtype {u.dtype}, but returned {given}.")
    if out.shape != u.shape:
        raise ValueError(
            f"the field must return the state's shape {tuple(u.shape)}, "
            f"but returned {tuple(out.shape)}."
        )
    known = {id(state), *map(id, inputs)}
    if isinstance(field, nn.Module):
        known.update(map(id, field.parameters()))
    captured = [x for x in _graph_leaves(out) if id(x) not in known]
    if captured:
        shapes = ", ".join(str(tuple(x.shape)) for x in captured[:4])
        raise CompileError(
            "the field captures tensors that require gradients and are neither parameters of it "
            f"nor part of p (shapes: {shapes}).\n"
            "  Make the field an nn.Module that owns them, pass them as p, or solve with "
            "compile=False."
        )


def _graph_leaves(output: Tensor) -> list[Tensor]:
    """The leaf tensors that a tensor's autograd graph ends in."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(edge for edge, _ in node.next_functions)
    return found
