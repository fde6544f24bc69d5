"""A report on this machine: the parts that the package uses, and remedies for those missing."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

from pysciml_node.errors import CompileError
from pysciml_node.julia_engine.commands import report
from pysciml_node.torch_engine.native import compiler

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
    """Declare the options.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--julia", action="store_true", help="start Julia, and show what it says of itself"
    )
    parser.add_argument(
        "--clear-native", action="store_true", help="remove the libraries of native code first"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report, and what to do.

    Args:
        arguments: those of `add_arguments`.

    Returns:
        0, or 1 when a package that the package needs is missing.

    Raises:
        EngineUnavailable: Julia was asked for, and does not start.
    """
    rows = environment()
    rows["cuda"] = "available" if torch.cuda.is_available() else "not available"
    engine = os.environ.get(ENGINE_VARIABLE)
    rows["engine"] = f"{engine} (set by {ENGINE_VARIABLE})" if engine else "auto"
    rows |= _native(arguments.clear_native)
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        advice = [f"install what is missing: {sys.executable} -m pip install {' '.join(missing)}"]
    else:
        rows |= report.rows()
        advice = report.advice()
    _show(rows)
    for text in advice:
        print(f"* {text}")
    if arguments.julia and not missing:
        _show(report.running())
    return 1 if missing else 0


def _native(clear: bool) -> dict[str, str]:
    """The C compiler, and the libraries that it has made."""
    chosen = compiler.find_compiler()
    name = chosen if isinstance(chosen, str) else f"{chosen.name}: {chosen.version}"
    try:
        removed = f", {compiler.clear()} removed" if clear else ""
        libraries = compiler.cached()
        size = sum(library.stat().st_size for library in libraries) / 1e6
        kept = f"{len(libraries)} libraries, {size:.1f} MB in {compiler.cache_folder()}{removed}"
    except CompileError as error:
        kept = str(error).replace("\n", "")
    return {"C compiler": name, "native code": kept}


def _show(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
