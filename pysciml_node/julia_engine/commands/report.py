"""The part of `doctor` about Julia, which does not start it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from pysciml_node.julia_engine.process import env, launch, runtime

_PREFIXES = ("JULIA_", "PYTHON_JULIACALL_", "PYTHON_JULIAPKG_", "PYSCIML_NODE_", "OPENBLAS_")
_GIGABYTE = 1 << 30


def rows() -> dict[str, str]:
    """The Julia that was chosen, its project and packages, and the settings that matter to it.

    Returns:
        Names and values, all of them text.
    """
    choice = launch.choose()
    installation = choice.installation
    shown: dict[str, str] = {}
    if installation is not None:
        julia, project = installation.julia, installation.project
        shown["julia"] = f"{julia.version}, {julia.executable} (by {installation.source})"
        shown["julia project"] = project
        shown |= _packages(project, julia.version, julia.depots)
        shown["to import juliacall first"] = _exports(installation)
        depots = [depot for depot in julia.depots if Path(depot).is_dir()]
    elif choice.problem is not None:
        shown["julia"] = f"not usable: {choice.problem.splitlines()[0]}"
        depots = []
    else:
        depots = os.environ.get("JULIA_DEPOT_PATH", str(Path.home() / ".julia")).split(os.pathsep)
        shown |= _juliapkg(depots)
    if depots:
        free = _free(depots[0])
        shown["julia depot"] = os.pathsep.join(depots) + (free and f" ({free})")
    shown["julia threads"] = env.threads()
    shown["julia package"] = str(env.bundled_project())
    shown["import order"] = "either; on macOS, import juliacall before torch"
    for number, note in enumerate(choice.notes, 1):
        shown[f"passed over {number}"] = note.splitlines()[0]
    sharing = _sharing()
    if sharing:
        shown["other users of juliacall"] = "; ".join(sharing)
    for name, value in sorted(os.environ.items()):
        if name.startswith(_PREFIXES):
            shown[name] = value
    return shown


def advice() -> list[str]:
    """Advice: a text for each setting that is amiss."""
    said = []
    reason = runtime.unavailable_reason()
    if reason is not None:
        said.append(f'engine="julia" cannot run: {reason}')
    variables = os.environ
    for name in ("JULIA_LOAD_PATH", "JULIA_PROJECT"):
        if name in variables:
            said.append(f"{name} is set: packages of another project can come in. Unset it.")
    if ("PYTHON_JULIACALL_EXE" in variables) != ("PYTHON_JULIACALL_PROJECT" in variables):
        said.append("set both of PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT, or neither.")
    if variables.get("PYTHON_JULIACALL_INIT") == "no":
        said.append("PYTHON_JULIACALL_INIT=no keeps Julia from starting. Unset it.")
    if env.threads() != "1" and variables.get("PYTHON_JULIACALL_HANDLE_SIGNALS") == "no":
        said.append(
            "several threads of Julia with PYTHON_JULIACALL_HANDLE_SIGNALS=no can crash. Unset it."
        )
    kernels = variables.get("OPENBLAS_CORETYPE")
    best = launch.KERNELS.get(torch.backends.cpu.get_cpu_capability())
    if kernels is not None and kernels != best:
        said.append(
            f"OPENBLAS_CORETYPE={kernels} names other kernels than this processor's ({best}); a "
            "network took 1.3 to 5 times as long. Unset it unless it is there for a reason."
        )
    if sys.platform == "darwin":
        said.append("on macOS, `import juliacall` before torch: the other order is known to crash.")
    return said


def running() -> dict[str, str]:
    """Start Julia, and show what it says of itself.

    Raises:
        EngineUnavailable: it does not start.
    """
    runtime.start()
    told = json.loads(runtime.call("info"))
    packages = told.pop("packages")
    shown = {f"running {name}": _text(value) for name, value in told.items()}
    wanted = (*env.needed_packages(), *env.optional_packages())
    loaded = [f"{name} {packages[name]}" for name in sorted(wanted) if name in packages]
    return {**shown, "running packages": ", ".join(loaded)}


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _exports(installation: env.Installation) -> str:
    """The variables by which juliacall finds the same Julia when it is imported before us."""
    named = {
        "PYTHON_JULIACALL_EXE": installation.julia.executable,
        "PYTHON_JULIACALL_PROJECT": installation.project,
        "JULIA_DEPOT_PATH": os.pathsep.join(installation.julia.depots),
    }
    return "set " + " ".join(f"{name}={value}" for name, value in named.items())


def _packages(project: str, julia_version: str, depots: Sequence[str]) -> dict[str, str]:
    versions = env.manifest_versions(project, julia_version)

    def listed(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} {versions[name]}".strip() for name in names if name in versions)

    needed, optional = env.needed_packages(), env.optional_packages()
    known = [name for name in (*needed, *optional) if name in versions]
    without, uncompiled = env.absent_packages(project, julia_version, depots, known)
    there = tuple(name for name in optional if name not in without)
    shown = {
        "julia packages": listed(tuple(name for name in needed if name not in without)),
        "loaded on demand": listed(there),
        "compiled when first used": ", ".join(uncompiled),
        "in the manifest, without files": ", ".join(without),
        "not in the project": ", ".join(name for name in optional if name not in versions),
    }
    return {key: value for key, value in shown.items() if value}


def _juliapkg(depots: Sequence[str]) -> dict[str, str]:
    from juliapkg.state import STATE

    if not launch.resolved():
        return {"julia": f"not installed ({launch.INSTALL})"}
    version, project = str(STATE["version"]), str(STATE["project"])
    return {
        "julia": f"{version}, {STATE['executable']} (by juliapkg)",
        "julia project": project,
        **_packages(project, version, depots),
    }


def _free(folder: str) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / _GIGABYTE:.0f} GB free"
    except OSError:
        return ""


def _sharing() -> list[str]:
    """Installed packages that need juliacall too, and which versions they accept."""
    needs = []
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        for requirement in distribution.requires or ():
            if requirement.startswith("juliacall") and name != "pysciml_node":
                needs.append(f"{name} {distribution.version} ({requirement})")
    return sorted(needs)
