"""The subcommands of `python -m pysciml_node`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from typing_extensions import override

import pysciml_node
from pysciml_node.errors import EngineUnavailable, SolverFailure


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, a line of help, and the module that runs it.

    The module has `add_arguments(parser)` and `run(arguments) -> exit status`. It is imported
    only when the command is asked for.
    """

    name: str
    help: str
    module: str


COMMANDS = (
    Command(
        "demo",
        "train the digits classifier with and without local-error regularization",
        "pysciml_node.experiments.demo.digits_demo",
    ),
    Command("doctor", "show what was found, and what to do about it", "pysciml_node.cli.doctor"),
    Command(
        "install",
        "install the Julia engine, or name a Julia that exists already",
        "pysciml_node.julia_engine.commands.install",
    ),
    Command(
        "precompile",
        "load every part of the Julia engine once, so that no solve has to compile it",
        "pysciml_node.julia_engine.commands.precompile",
    ),
    Command(
        "test",
        "run the tests of the Julia engine and of what all engines agree on",
        "pysciml_node.julia_engine.commands.selftest",
    ),
)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says what is taken where nothing is given, but of flags and of what has no default."""

    @override
    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = action.default is not None and action.default is not False
        return super()._get_help_string(action) if named else action.help


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the words after the program's name; the process's own when None.

    Returns:
        The exit status: 0 for success.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m pysciml_node", description="Neural differential equations in PyTorch."
    )
    parser.add_argument(
        "--version", action="version", version=f"pysciml_node {pysciml_node.__version__}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = {}
    try:
        for command in COMMANDS:
            subparser = commands.add_parser(
                command.name,
                help=command.help,
                description=command.help[0].upper() + command.help[1:] + ".",
                formatter_class=_Help,
            )
            if words[:1] == [command.name]:
                chosen[command.name] = _module(command)
                chosen[command.name].add_arguments(subparser)
        arguments = parser.parse_args(words)
        return int(chosen[arguments.command].run(arguments))
    except (ImportError, OSError, ValueError, EngineUnavailable, SolverFailure) as error:
        print(f"{parser.prog} {words[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _module(command: Command) -> ModuleType:
    """The module that runs a command."""
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("pysciml_node.experiments"):
            raise
        raise ImportError(
            "the experiments are in the source of the package, not in its wheel.\n"
            f"  Run it in a checkout: make {command.name}"
        ) from None
