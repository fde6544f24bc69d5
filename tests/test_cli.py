"""The command line."""

import subprocess
import sys

import pytest

from pysciml_node import __main__ as cli
from pysciml_node import doctor


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(command.name in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m pysciml_node {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["dance"], ["doctor", "--fast"]])
def test_wrong_words_are_refused_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: python -m pysciml_node" in capsys.readouterr().err


def test_errors_of_a_command_are_one_message_and_a_status(monkeypatch, capsys):
    def fail(arguments):
        raise ValueError("--seeds must be at least 1, but is 0.")

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "python -m pysciml_node doctor: --seeds must be at least 1, but is 0.\n"
    )


def test_doctor_reports_without_starting_julia():
    script = (
        "import sys; from pysciml_node.__main__ import main; status = main(['doctor']); "
        "sys.exit(status or 'juliacall' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("python", "torch", "numpy", "juliacall", "platform", "julia", "engine"):
        assert any(line.split()[0] == name for line in done.stdout.splitlines())


def test_doctor_names_a_julia_that_is_set_but_absent(monkeypatch, capsys):
    monkeypatch.setenv("PYSCIML_NODE_JULIA", "/nowhere/julia")
    monkeypatch.setenv("PYSCIML_NODE_ENGINE", "torch")
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "PYSCIML_NODE_JULIA is '/nowhere/julia', which is no executable" in shown
    assert "torch (set by PYSCIML_NODE_ENGINE)" in shown


def test_doctor_finds_the_julia_that_is_set(monkeypatch, tmp_path):
    julia = tmp_path / "julia"
    julia.write_text("#!/bin/sh\n")
    julia.chmod(0o755)
    monkeypatch.setenv("PYSCIML_NODE_JULIA", str(julia))
    assert doctor.find_julia() == str(julia)
    monkeypatch.delenv("PYSCIML_NODE_JULIA")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.find_julia() == str(julia)


def test_a_package_that_is_not_installed_has_no_version():
    assert doctor.package_version("no-such-package-as-this") is None
