"""The command `install`: a Julia and its packages, made by juliapkg or named by the user."""

from __future__ import annotations

import argparse
import os
import sys

from pysciml_node.julia_engine.commands.precompile import precompile
from pysciml_node.julia_engine.process import env, launch, registration

_GIGABYTES = 3
_CUDA = {"uuid": "052768ef-5323-5732-b1bb-66c8b64840ba", "version": "5, 6"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--julia", metavar="PATH", help="use this Julia, and remember it")
    parser.add_argument(
        "--project", metavar="PATH", help="use this existing project as it is, and remember it"
    )
    parser.add_argument("--cuda", action="store_true", help="install CUDA.jl too")
    parser.add_argument(
        "--force",
        action="store_true",
        help="forget a remembered Julia, and install again even if everything is there",
    )
    parser.add_argument("--yes", action="store_true", help="install without asking")
    parser.add_argument(
        "--remove",
        action="store_true",
        help="forget everything: other packages that use Julia in this environment no longer get "
        "the engine's packages (before pip uninstall)",
    )


def record(executable: str, project: str | None) -> env.Record:
    """Check a Julia that exists, with its project, and remember both.

    Args:
        executable: a path, or a name on the path.
        project: folder of a project that holds the engine's packages. None takes the project that
            is active in that Julia if it holds them, and else one that juliapkg makes.

    Returns:
        The record that was written.

    Raises:
        ValueError: the engine does not run on this executable, or the project lacks a package.
    """
    julia = env.describe(executable)
    if isinstance(julia, str):
        raise ValueError(f"{julia}.\n  Give --julia the path of one: {env.SUPPORTED_JULIA}.")
    folder = os.path.abspath(project) if project else julia.project
    why = env.misfit(julia, folder)
    if why is not None and project:
        raise ValueError(why)
    kept = env.Record(os.path.abspath(julia.executable), folder if why is None else None)
    print(f"remembered in {env.write_record(kept)}")
    return kept


def run(arguments: argparse.Namespace) -> int:
    """Install, and load everything once.

    Args:
        arguments: those of `add_arguments`.

    Returns:
        0, or 1 when a package is missing or the user declined.

    Raises:
        ValueError: the Julia or project named does not fit, or there is nobody to ask and no
            `--yes`.
    """
    if arguments.remove:
        return _remove()
    if arguments.julia or arguments.project:
        record(arguments.julia or "julia", arguments.project)
    elif arguments.force:
        for path in env.remove_record():
            print(f"removed {path}")
    choice = launch.choose()
    if choice.problem is not None:
        raise ValueError(choice.problem)
    if choice.installation is not None:
        installation = choice.installation
        if arguments.cuda:
            raise ValueError(
                f"the project {installation.project} exists already and is not changed.\n"
                f"  {launch.how_to_add('CUDA')}"
            )
        print(f"nothing to install: {launch.describe()}")
    elif not _install(arguments):
        return 1
    return 1 if precompile() else 0


def _install(arguments: argparse.Namespace) -> bool:
    """Install unless everything is there; return whether the user agreed."""
    import juliapkg

    if not (arguments.force or arguments.cuda) and launch.resolved():
        print("the Julia packages are installed already (--force installs them again)")
        return True
    if not (arguments.yes or _agreed()):
        print("nothing was installed")
        return False
    if arguments.cuda:
        juliapkg.add("CUDA", **_CUDA)
    launch.install_packages(force=arguments.force)
    return True


def _agreed() -> bool:
    """Ask whether to download."""
    cost = f"Julia and its packages: up to {_GIGABYTES} GB and about {launch.MINUTES} minutes"
    if not sys.stdin.isatty():
        raise ValueError(
            f"this downloads and compiles {cost}, and there is nobody to ask.\n"
            f"  Run: {launch.INSTALL} --yes"
        )
    answer = input(f"This downloads and compiles {cost}. Go on? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _remove() -> int:
    removed = [f"removed {path}" for path in env.remove_record()]
    if registration.unregister():
        removed.append("the engine's packages are off juliapkg's list")
    print("\n".join(removed) or "there was nothing to remove")
    return 0
