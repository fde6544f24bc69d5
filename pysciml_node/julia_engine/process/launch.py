"""Finding, installing and starting the Julia of the engine, once in a process."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from functools import cache
from typing import Any

import torch

from pysciml_node.errors import EngineUnavailable
from pysciml_node.julia_engine.process import env, registration
from pysciml_node.julia_engine.process.errors import translate

MODULE = "PySciMLNode"
INSTALL = "python -m pysciml_node install"
_DOCTOR = "See what is wrong with: python -m pysciml_node doctor"
MINUTES = "10 to 40"
KERNELS = {"AVX512": "SkylakeX", "AVX2": "Haswell"}
"""OpenBLAS's names for its kernels, by the instructions that torch sees in the processor."""


def runs_already() -> bool:
    """Whether Julia has been started through juliacall, by this package or by other code."""
    juliacall = sys.modules.get("juliacall")
    return juliacall is not None and bool(juliacall.CONFIG.get("inited"))


@cache
def choose() -> env.Choice:
    """The Julia that would be started; decided once in a process."""
    choice = env.choose(search_path=False)
    if choice.problem is not None or choice.installation is not None:
        return choice
    if choice.executable is not None:
        os.environ.setdefault("PYTHON_JULIAPKG_EXE", choice.executable)
        return choice
    return choice if resolved() else env.choose()


def resolved() -> bool:
    """Whether juliapkg's environment is complete, so that nothing needs to be installed."""
    import juliapkg
    from juliapkg.state import STATE

    # A dry run makes the project's folder; where there is none, nothing can be resolved. Another
    # package may have had juliapkg make one that lacks the engine's.
    return (
        os.path.exists(STATE["meta"])
        and registration.registered()
        and bool(juliapkg.resolve(dry_run=True))
    )


def describe() -> str:
    """The Julia that runs or would be started, in words."""
    if runs_already():
        base = sys.modules["juliacall"].Base
        project = os.path.dirname(str(base.active_project()))
        return f"Julia {base.VERSION}, running, project {project}"
    installation = choose().installation
    if installation is not None:
        julia = installation.julia
        place = f"project {installation.project}, by {installation.source}"
        return f"Julia {julia.version}, {julia.executable}, {place}"
    from juliapkg.state import STATE

    return f"the environment made by juliapkg, {STATE['project']}"


def missing() -> str | None:
    """The steps to take before Julia can be started; None when there are none."""
    if runs_already():
        return None
    choice = choose()
    if choice.problem is not None:
        return choice.problem
    if choice.installation is not None or resolved():
        return None
    looked = "".join(f"\n  Passed over {note.splitlines()[0]}" for note in choice.notes)
    return (
        "the Julia packages of the engine are not installed.\n"
        f"  Run once: {INSTALL} (about {MINUTES} minutes), or name an existing Julia: "
        f"{INSTALL} --julia PATH [--project PATH]{looked}"
    )


def how_to_add(name: str) -> str:
    """The command that adds a package to the Julia that runs."""
    installation = choose().installation
    if installation is None:
        return f"Repair the installation with: {INSTALL} --force"
    return (
        f"Add it to the project: {installation.julia.executable} --project={installation.project} "
        f"-e 'using Pkg; Pkg.add(\"{name}\")'"
    )


def install_packages(*, force: bool = False) -> None:
    """Let juliapkg install the packages, and Julia if need be; its output is shown.

    Args:
        force: whether everything is resolved anew.

    Raises:
        EngineUnavailable: it failed, or installing is switched off.
    """
    if os.environ.get("PYTHON_JULIAPKG_OFFLINE") == "yes":
        raise EngineUnavailable(
            "the Julia packages of the engine are not installed, and PYTHON_JULIAPKG_OFFLINE=yes "
            f"forbids to install them.\n  Unset it and run {INSTALL}, or name an existing Julia "
            f"and project: {INSTALL} --julia PATH --project PATH"
        )
    print(
        f"pysciml_node: installing the Julia packages of the engine, about {MINUTES} minutes, "
        f"once for this environment.",
        file=sys.stderr,
        flush=True,
    )
    import juliapkg

    registration.register()
    try:
        juliapkg.resolve(force=force)
    except Exception as error:
        raise EngineUnavailable(
            f"installing the Julia packages failed: {error}\n"
            f"  {_DOCTOR}. Try again with: {INSTALL} --force"
        ) from None


def prepare() -> None:
    """Make juliacall find what was chosen.

    Raises:
        EngineUnavailable: there is nothing to start.
    """
    if runs_already():
        return
    reason = missing()
    installation = choose().installation
    if installation is not None:
        env.point_to(installation)
    elif reason is not None:
        raise EngineUnavailable(reason)
    named = choose().executable
    if named is not None:
        julia = env.describe(named)
        if isinstance(julia, env.Julia):
            env.take_over(julia)
    env.set_defaults()
    _name_kernels()


def _name_kernels() -> None:
    """Tell OpenBLAS this processor's kernels.

    Builds that do not know a processor fall back to kernels without AVX, at a fifth of the speed.
    """
    kernels = KERNELS.get(torch.backends.cpu.get_cpu_capability())
    if kernels is not None:
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)


def launch() -> tuple[Any, Any]:
    """Start Julia, unless it runs, and load the engine.

    Returns:
        The module juliacall, and the engine's module in Julia.

    Raises:
        EngineUnavailable: either fails; the message says what to do.
    """
    try:
        juliacall = _import_juliacall()
        return juliacall, _load(juliacall)
    except EngineUnavailable:
        raise
    except Exception as error:
        text = "\n".join(str(error).splitlines()[:20])
        raise EngineUnavailable(f"Julia did not start: {text}\n  {_DOCTOR}") from error


def _import_juliacall() -> Any:
    with warnings.catch_warnings():
        # Torch is always here first, unless the user's own code has imported juliacall before; both
        # orders are tested. macOS is where the other order is known to be the only safe one.
        if sys.platform != "darwin":
            warnings.filterwarnings("ignore", message="torch was imported before juliacall")
        juliacall = importlib.import_module("juliacall")
    if not juliacall.CONFIG.get("inited"):
        raise EngineUnavailable(
            "juliacall was told not to start Julia.\n  Unset PYTHON_JULIACALL_INIT."
        )
    if int(juliacall.Base.Threads.threadid()) != 1:
        raise EngineUnavailable(
            "Julia was started by another thread, and only that thread may use it.\n"
            "  Import juliacall and solve in the same thread."
        )
    _unblock_interrupts()
    return juliacall


def _unblock_interrupts() -> None:
    """Let SIGINT reach Python again: a Julia that handles signals blocks it in this thread."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_LOAD = """
function (name, bundled, depot)
    here = Base.identify_package(name)
    shared = here === nothing
    if shared
        push!(LOAD_PATH, bundled)
        here = Base.identify_package(name)
        pushfirst!(DEPOT_PATH, depot)
    end
    try
        if !Base.isprecompiled(here)
            println(stderr, "pysciml_node: precompiling the Julia part of the engine, once.")
        end
        engine = Base.require(here)
        shared && (engine.DEPOT[] = depot)
        return engine
    finally
        shared && filter!(!=(depot), DEPOT_PATH)
    end
end
"""


def _load(juliacall: Any) -> Any:
    load = juliacall.Main.seval(_LOAD)
    try:
        return load(MODULE, str(env.bundled_project()), str(env.compiled_folder()))
    except juliacall.JuliaError as error:
        translated = translate(error)
        raise EngineUnavailable(
            f"the Julia part of the engine did not load: {translated}\n  {_DOCTOR}"
        ) from translated
