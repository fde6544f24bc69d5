"""What this machine has that the package uses, found without starting Julia."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

import torch

JULIA_VARIABLE = "PYSCIML_NODE_JULIA"
ENGINE_VARIABLE = "PYSCIML_NODE_ENGINE"
_PACKAGES = ("torch", "numpy", "juliacall")


def package_version(name: str) -> str | None:
    """Version of an installed package, from its metadata; it is not imported.

    Args:
        name: of the package.

    Returns:
        The version, or None when it is not installed.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_julia() -> str | None:
    """The Julia executable that is set or on the path, without running it.

    Returns:
        What ``PYSCIML_NODE_JULIA`` names if that is an executable, else the ``julia`` on the
        path, else None.
    """
    named = os.environ.get(JULIA_VARIABLE)
    return shutil.which(named) if named else shutil.which("julia")


def environment() -> dict[str, str]:
    """Versions, platform and threads, as a report or a results file shows them.

    Returns:
        Names and values, all of them text.
    """
    packages = {name: package_version(name) or "not installed" for name in _PACKAGES}
    return {
        "pysciml_node": package_version("pysciml_node") or "not installed",
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options of its own."""
    del parser


def run(arguments: argparse.Namespace) -> int:
    """Print the report.

    Args:
        arguments: none are used.

    Returns:
        0, or 1 when a package that the package needs is missing.
    """
    del arguments
    rows = environment()
    julia = find_julia()
    named = os.environ.get(JULIA_VARIABLE)
    if julia is not None:
        rows["julia"] = julia
    elif named:
        rows["julia"] = f"not found: {JULIA_VARIABLE} is {named!r}, which is no executable"
    else:
        rows["julia"] = f"not found on PATH, and {JULIA_VARIABLE} is not set"
    rows["cuda"] = "available" if torch.cuda.is_available() else "not available"
    engine = os.environ.get(ENGINE_VARIABLE)
    rows["engine"] = f"{engine} (set by {ENGINE_VARIABLE})" if engine else "auto"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing: {', '.join(missing)}. Install with: pip install {' '.join(missing)}")
        print(f"(this is {sys.executable})")
    return 1 if missing else 0
