"""Finding and installing Julia, without one; and what is done with one that does not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import pysciml_node as psn
from pysciml_node.errors import EngineUnavailable
from pysciml_node.julia_engine.commands import install
from pysciml_node.julia_engine.process import env, launch, registration, runtime

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for Julia is a shell script")

ANSWER = '#!/bin/sh\nprintf "1.10.8\\0/bin\\0/lib/libjulia.so\\0{project}\\0/depot"\n'


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has not started Julia, on a machine that has none."""
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    monkeypatch.setattr(env, "record_paths", lambda: (tmp_path / "julia.json",))
    monkeypatch.setattr(launch, "resolved", lambda: False)
    monkeypatch.setattr(launch, "runs_already", lambda: False)
    monkeypatch.setattr(runtime, "_runtime", runtime._Runtime())
    monkeypatch.setattr(install, "precompile", list)
    env.describe.cache_clear()
    launch.choose.cache_clear()
    yield
    launch.choose.cache_clear()


@pytest.fixture
def julia(tmp_path: Path) -> str:
    """An executable with a project that holds everything."""
    project = tmp_path / "project"
    project.mkdir()
    versions = dict.fromkeys(env.needed_packages(), "1.0.0")
    versions["PythonCall"] = str(env.juliacall_version())
    entries = [f'[[deps.{name}]]\nversion = "{version}"\n' for name, version in versions.items()]
    (project / "Manifest.toml").write_text("".join(entries))
    script = tmp_path / "julia"
    script.write_text(ANSWER.format(project=project))
    script.chmod(0o755)
    return str(script)


def options(**given: object) -> Namespace:
    return Namespace(
        **{
            "julia": None,
            "project": None,
            "cuda": False,
            "force": False,
            "yes": True,
            "remove": False,
            **given,
        }
    )


def test_without_julia_the_remedy_is_named():
    reason = runtime.unavailable_reason()
    assert reason is not None
    assert "python -m pysciml_node install" in reason
    assert "--julia PATH" in reason
    with pytest.raises(EngineUnavailable, match="python -m pysciml_node install"):
        runtime.start()


def test_installing_is_announced_in_one_line(monkeypatch, capsys):
    import juliapkg

    def resolve(**options: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(juliapkg, "resolve", resolve)
    monkeypatch.setattr(registration, "register", lambda: None)
    with pytest.raises(EngineUnavailable, match=r"no network(.|\n)*install --force"):
        launch.install_packages()
    announced = capsys.readouterr().err
    assert announced.count("\n") == 1
    assert "minutes" in announced


def test_nothing_is_installed_offline(monkeypatch):
    monkeypatch.setitem(os.environ, "PYTHON_JULIAPKG_OFFLINE", "yes")
    with pytest.raises(EngineUnavailable, match="--julia PATH --project PATH"):
        launch.install_packages()


def test_a_solve_installs_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "install_packages", lambda **options: asked.append(options))
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0))
    with pytest.raises(EngineUnavailable, match="python -m pysciml_node install"):
        psn.solve(problem, engine="julia")
    assert asked == []


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (
            {"algorithm": psn.FBDF()},
            r"^FBDF\(\) is not an algorithm of the torch(.|\n)*Rodas5P",
        ),
        ({"adjoint": psn.QuadratureAdjoint()}, "^QuadratureAdjoint is an adjoint of the Julia"),
    ],
    ids=["algorithm", "adjoint"],
)
def test_what_only_julia_has_is_named_where_nobody_asked_for_julia(chosen, why):
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0))
    many = psn.EnsembleProblem(problem, torch.ones(2, 1))
    for asked in (problem, many):
        with pytest.raises(EngineUnavailable, match=rf"{why}(.|\n)*pysciml_node install"):
            psn.solve(asked, **chosen)


def test_an_existing_julia_is_remembered_with_its_own_project(julia, capsys):
    assert install.run(options(julia=julia)) == 0
    record = env.read_record()
    assert record == env.Record(julia, str(Path(julia).parent / "project"))
    assert "nothing to install" in capsys.readouterr().out
    assert runtime.unavailable_reason() is None


def test_a_project_that_lacks_something_is_not_remembered(julia, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no readable manifest"):
        install.run(options(julia=julia, project=str(empty)))
    assert env.read_record() is None


def test_what_is_no_julia_is_not_remembered():
    with pytest.raises(ValueError, match="does not answer as Julia"):
        install.run(options(julia="true"))
    assert env.read_record() is None


def test_force_forgets(julia, monkeypatch):
    install.run(options(julia=julia))
    launch.choose.cache_clear()
    forced = []
    monkeypatch.setattr(launch, "install_packages", lambda *, force: forced.append(force))
    assert install.run(options(force=True)) == 0
    assert env.read_record() is None
    assert forced == [True]


def test_cuda_is_asked_of_juliapkg_and_not_put_into_an_existing_project(julia, monkeypatch):
    import juliapkg

    added = []
    monkeypatch.setattr(juliapkg, "add", lambda name, **options: added.append((name, options)))
    monkeypatch.setattr(launch, "install_packages", lambda *, force: None)
    install.run(options(cuda=True))
    assert added[0][0] == "CUDA"
    launch.choose.cache_clear()
    with pytest.raises(ValueError, match=r"Pkg\.add"):
        install.run(options(cuda=True, julia=julia))


def test_a_julia_that_does_not_start_is_told_once_and_for_all(julia, tmp_path):
    """It answers, but there is no library behind it."""
    script = (
        "import json; from pysciml_node import EngineUnavailable; "
        "from pysciml_node.julia_engine.process import runtime\n"
        "told = [runtime.unavailable_reason()]\n"
        "for _ in range(2):\n"
        "    try: runtime.start()\n"
        "    except EngineUnavailable as error: told.append(str(error))\n"
        "print(json.dumps([*told, runtime.unavailable_reason()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "/usr/bin:/bin", "PYSCIML_NODE_JULIA": julia, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    before, first, second, after = json.loads(done.stdout)
    assert before is None
    assert "Julia did not start" in first
    assert "doctor" in first
    assert first == second == after


@pytest.mark.parametrize(("answer", "installs"), [("y", True), ("Yes ", True), ("", False)])
def test_an_installation_is_agreed_to(answer, installs, monkeypatch, capsys):
    asked, installed = [], []
    monkeypatch.setattr(sys, "stdin", Namespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    monkeypatch.setattr(launch, "install_packages", lambda *, force: installed.append(force))
    assert install.run(options(yes=False)) == (0 if installs else 1)
    assert "GB" in asked[0]
    assert "minutes" in asked[0]
    assert bool(installed) is installs


def test_nobody_to_ask_is_not_consent(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Namespace(isatty=lambda: False))
    with pytest.raises(ValueError, match=r"minutes(.|\n)*install --yes"):
        install.run(options(yes=False))


def test_everything_is_forgotten_on_request(julia, monkeypatch, capsys):
    install.run(options(julia=julia))
    monkeypatch.setattr(registration, "unregister", lambda: True)
    assert install.run(options(remove=True)) == 0
    assert env.read_record() is None
    assert "juliapkg's list" in capsys.readouterr().out
