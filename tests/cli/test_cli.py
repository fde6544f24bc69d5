"""The command line."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

import pysciml_node
from pysciml_node.cli import doctor
from pysciml_node.cli import main as cli


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
    shown = " ".join(capsys.readouterr().out.split())
    assert f"python -m pysciml_node {command}" in shown
    assert "default: None" not in shown
    assert "default: False" not in shown


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"pysciml_node {pysciml_node.__version__}\n"
    assert pysciml_node.__version__ == importlib.metadata.version("pysciml_node")


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
        "import sys; from pysciml_node.cli.main import main; status = main(['doctor']); "
        "sys.exit(status or 'juliacall' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("python", "torch", "numpy", "juliacall", "platform", "julia", "engine"):
        assert any(line.split()[0] == name for line in done.stdout.splitlines())


def doctor_in_a_process(**variables: str) -> str:
    """What doctor prints with these variables, and no others that bear on Julia."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JULIA_", "PYTHON_JULIA", "PYSCIML_NODE_", "OPENBLAS_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pysciml_node", "doctor"],
        capture_output=True,
        text=True,
        env={**kept, **variables},
        check=True,
    )
    return done.stdout


def test_doctor_names_a_julia_that_is_set_but_absent():
    shown = doctor_in_a_process(PYSCIML_NODE_JULIA="/nowhere/julia", PYSCIML_NODE_ENGINE="torch")
    assert "'/nowhere/julia' is no executable (named by PYSCIML_NODE_JULIA)" in shown
    assert "torch (set by PYSCIML_NODE_ENGINE)" in shown


def test_doctor_says_what_to_do_about_the_environment():
    amiss = {
        "OPENBLAS_CORETYPE": ("Prescott", "1.3 to 5 times as long"),
        "JULIA_LOAD_PATH": ("@", "JULIA_LOAD_PATH is set"),
        "JULIA_NUM_THREADS": ("4", "can crash"),
        "PYTHON_JULIACALL_HANDLE_SIGNALS": ("no", "can crash"),
        "PYTHON_JULIACALL_EXE": ("julia", "or neither"),
        "PYTHON_JULIACALL_INIT": ("no", "keeps Julia from starting"),
    }
    variables = {name: value for name, (value, _) in amiss.items()}
    shown = doctor_in_a_process(**variables, PYSCIML_NODE_JULIA="/nowhere/julia").splitlines()
    for name, (value, words) in amiss.items():
        assert any(line.split() == [name, value] for line in shown)
        assert any(line.startswith("* ") and words in line for line in shown)


def test_a_package_that_is_not_installed_has_no_version():
    assert doctor.package_version("no-such-package-as-this") is None


def test_doctor_shows_the_libraries_of_native_code_and_clears_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PSN_NATIVE_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    for name in ("one.so", "two.so"):
        (tmp_path / name).write_bytes(bytes(600_000))
    cli.main(["doctor"])
    assert f"2 libraries, 1.2 MB in {tmp_path}\n" in capsys.readouterr().out
    cli.main(["doctor", "--clear-native"])
    assert f"0 libraries, 0.0 MB in {tmp_path}, 2 removed\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_demonstration_is_not_in_a_wheel(monkeypatch, capsys):
    """As an installed wheel answers, which has no experiments."""
    for name in [name for name in sys.modules if name.startswith("pysciml_node.experiments")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pysciml_node.experiments", None)
    assert cli.main(["demo"]) == 1
    assert "not in its wheel.\n  Run it in a checkout: make demo" in capsys.readouterr().err
