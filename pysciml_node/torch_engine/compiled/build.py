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

from pysciml_node.steps.inputs import graph_leaves
from pysciml_node.torch_engine.compiled.passes import rewrite_products


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


class Graph:
    """A function of tensors, compiled into one graph when it is first called.

    Args:
        function: takes the field as its first argument.
        device: where it runs.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        assert isinstance(function, types.FunctionType)
        # Compiled graphs are kept by code object. A code object of its own keeps the graphs of one
        # solver from being searched, counted and thrown out with those of the others.
        self._own = _with_code(function, function.__code__.replace())
        options: dict[str, Any] = {"guard_filter_fn": _field_guards}
        if device.type == "cpu":
            # A wrapper in C++ takes the loop itself out of Python.
            options["cpp_wrapper"] = True
            options["post_grad_custom_post_pass"] = rewrite_products
        # `dynamic=False`: shapes seen in other solvers must not make this one's dynamic.
        self._compiled = torch.compile(self._own, fullgraph=True, dynamic=False, options=options)
        self._check: Callable[[dict[str, Any]], bool] | None = None
        self._direct: Callable[..., Any] = self._compiled
        self._closure = {
            name: cell.cell_contents
            for name, cell in zip(
                function.__code__.co_freevars, function.__closure__ or (), strict=True
            )
        }

    def __call__(self, field: Any, leaves: tuple[Tensor, ...], *rest: Any) -> Any:
        """Run the graph.

        Raises:
            CompileError: it cannot be compiled.
        """
        # What the compiler's own entry does besides costs a small solve a third of its time.
        if self._check is not None and self._check(
            {"field": field, "leaves": leaves, "rest": rest, **self._closure}
        ):
            return self._direct(field, leaves, *rest)
        try:
            found = self._compiled(field, leaves, *rest)
        except Exception as error:
            kinds = ("torch._dynamo", "torch._inductor", "torch.fx")
            if not type(error).__module__.startswith(kinds):
                raise
            raise CompileError(
                f"the solve cannot be compiled: {_cause(error)}\n"
                "  Control flow that depends on the values of tensors, printing, and calls that "
                "leave PyTorch do not compile.\n"
                "  Rewrite them in the field (torch.where), or solve with compile=False."
            ) from error
        self._find_direct()
        return found

    def _find_direct(self) -> None:
        """Get hold of what was compiled, and of the guards that say whether it still is right."""
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        entry = _debug_get_cache_entry_list(self._own.__code__)[0]
        self._direct = _with_code(self._own, entry.code)
        self._check = entry.guard_manager.check


def _with_code(function: types.FunctionType, code: types.CodeType) -> types.FunctionType:
    return types.FunctionType(
        code, function.__globals__, function.__name__, None, function.__closure__
    )


def _field_guards(guards: list[Any]) -> list[bool]:
    """Keep the guards on the field and what it reads: the rest is ours and does not change."""
    ours = ("L['rest']", "L['leaves']", "L['stepper']", "L['names']", "L['wanted']", "L['p_")
    torchs = ("G['torch']", "G['__import_torch", f"G['__import_{_mangled(__package__ or '')}")
    return [not _root(guard.name).startswith(ours + torchs) for guard in guards]


def _mangled(package: str) -> str:
    return package.replace(".", "_dot_")


def _root(name: str) -> str:
    """A guard's name from the variable on: some are wrapped in calls, `dict(type(L['f']))`."""
    starts = [i for i in (name.find("L['"), name.find("G['")) if i >= 0]
    return name[min(starts) :] if starts else name


def _cause(error: Exception) -> str:
    """The line of a compiler's message that explains most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Explanation:", "RuntimeError:"))]
    return (told or lines or [type(error).__name__])[0].removeprefix("Explanation: ")


def check_field(
    field: Any, t: Tensor, u: Tensor, leaves: list[Tensor], call: Callable[..., Tensor]
) -> None:
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
    captured = [x for x in graph_leaves((out,)) if id(x) not in known]
    if captured:
        shapes = ", ".join(str(tuple(x.shape)) for x in captured[:4])
        raise CompileError(
            "the field captures tensors that require gradients and are neither parameters of it "
            f"nor part of p (shapes: {shapes}).\n"
            "  Make the field an nn.Module that owns them, pass them as p, or solve with "
            "compile=False."
        )
