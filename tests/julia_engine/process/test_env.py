"""Which Julia is chosen, without running one: executables here are scripts that answer as Julia."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pysciml_node.julia_engine.process import env

posix = pytest.mark.skipif(os.name == "nt", reason="the stand-ins for Julia are shell scripts")
pytestmark = posix


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable, no record, and nothing on the path."""
    for name in list(os.environ):
        if name.startswith(("JULIA_", "PYTHON_JULIA", "PYSCIML_NODE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(env, "record_paths", lambda: (tmp_path / "record" / "julia.json",))
    env.describe.cache_clear()


@pytest.fixture
def make_julia(tmp_path: Path) -> Callable[..., str]:
    def make(name: str = "julia", version: str = "1.10.8", project: Path | str = "/nowhere") -> str:
        folder = tmp_path / f"bin-{name}"
        folder.mkdir(exist_ok=True)
        script = folder / "julia"
        answer = "\\0".join([version, str(folder), "/lib/libjulia.so", str(project), "/a\\n/b"])
        script.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        script.chmod(0o755)
        return str(script)

    return make


@pytest.fixture
def make_project(tmp_path: Path) -> Callable[..., str]:
    def make(name: str = "project", pythoncall: str | None = None, without: str = "") -> str:
        folder = tmp_path / name
        folder.mkdir()
        versions = dict.fromkeys(env.needed_packages(), "1.0.0")
        versions["PythonCall"] = pythoncall or env.juliacall_version() or "0.9.34"
        versions.pop(without, None)
        lines = ['manifest_format = "2.0"']
        for package, version in versions.items():
            lines += [f"[[deps.{package}]]", f'version = "{version}"']
        (folder / "Manifest.toml").write_text("\n".join(lines) + "\n")
        return str(folder)

    return make


def test_an_executable_describes_itself(make_julia):
    julia = env.describe(make_julia(version="1.11.3"))
    assert isinstance(julia, env.Julia)
    assert (julia.version, julia.depots, julia.supported) == ("1.11.3", ("/a", "/b"), True)


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("1.9.4", False),
        ("1.10.7", False),
        ("1.10.8", True),
        ("1.11.0-rc1", True),
        ("1.11.9", True),
        ("1.12.0-DEV.3", False),
        ("2.0.0", False),
    ],
)
def test_versions_that_are_supported(make_julia, version, supported):
    found = env.describe(make_julia(version=version))
    assert isinstance(found, env.Julia) == supported
    assert supported or (version in str(found) and env.SUPPORTED_JULIA in str(found))


def test_what_is_no_julia_is_told(tmp_path):
    assert "no executable" in str(env.describe(str(tmp_path / "absent")))
    assert "does not answer as Julia" in str(env.describe("true"))
    assert "failed" in str(env.describe("false"))


def test_the_order_of_choice(make_julia, make_project, monkeypatch):
    """Each source is weaker than the next, and every one yields its own project."""
    chosen = []

    def choose() -> None:
        choice = env.choose()
        assert choice.installation is not None, choice
        chosen.append((choice.installation.julia.executable, choice.installation.project))

    expected = []
    for source in ("path", "record", "named", "juliacall"):
        project = make_project(source)
        executable = make_julia(source, project=project)
        expected.append((executable, project))
        if source == "path":
            monkeypatch.setenv("PATH", f"{Path(executable).parent}:/usr/bin:/bin")
        elif source == "record":
            env.write_record(env.Record(executable, project))
        elif source == "named":
            monkeypatch.setenv("PYSCIML_NODE_JULIA", executable)
            monkeypatch.setenv("PYSCIML_NODE_JULIA_PROJECT", project)
        else:
            monkeypatch.setenv("PYTHON_JULIACALL_EXE", executable)
            monkeypatch.setenv("PYTHON_JULIACALL_PROJECT", project)
        choose()
    assert chosen == expected


def test_one_variable_is_completed_by_the_other_sources(make_julia, make_project, monkeypatch):
    own, other = make_project("own"), make_project("other")
    executable = make_julia(project=own)
    monkeypatch.setenv("PYSCIML_NODE_JULIA", executable)
    assert env.choose().installation.project == own
    monkeypatch.delenv("PYSCIML_NODE_JULIA")
    monkeypatch.setenv("PATH", f"{Path(executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYSCIML_NODE_JULIA_PROJECT", other)
    assert env.choose().installation.project == other


def test_a_named_julia_without_a_project_is_left_to_juliapkg(make_julia, monkeypatch):
    executable = make_julia()
    monkeypatch.setenv("PYSCIML_NODE_JULIA", executable)
    choice = env.choose()
    assert (choice.installation, choice.problem, choice.executable) == (None, None, executable)


def test_nothing_anywhere_is_no_problem_but_a_note():
    choice = env.choose()
    assert choice.installation is None
    assert choice.problem is None
    assert "no executable" in choice.notes[0]


@pytest.mark.parametrize(
    ("project", "words"),
    [
        ({"without": "SciMLBase"}, ["lacks SciMLBase", "Pkg.add"]),
        ({"pythoncall": "0.9.1"}, ["PythonCall 0.9.1", "pip install juliacall==0.9.1"]),
    ],
)
def test_a_project_that_does_not_fit_is_refused_with_the_remedy(
    make_julia, make_project, monkeypatch, project, words
):
    executable, folder = make_julia(), make_project(**project)
    monkeypatch.setenv("PYSCIML_NODE_JULIA", executable)
    monkeypatch.setenv("PYSCIML_NODE_JULIA_PROJECT", folder)
    problem = env.choose().problem
    assert problem is not None
    assert all(word in problem for word in [*words, "PYSCIML_NODE_JULIA"])


def test_a_broken_julia_that_was_named_is_a_problem(monkeypatch):
    monkeypatch.setenv("PYSCIML_NODE_JULIA", "false")
    assert "PYSCIML_NODE_JULIA" in env.choose().problem


def test_a_manifest_named_after_the_version_comes_first(make_project):
    folder = Path(make_project(pythoncall="0.9.1"))
    (folder / "Manifest-v1.11.toml").write_text('[[deps.PythonCall]]\nversion = "0.9.2"\n')
    assert env.manifest_versions(folder, "1.11.4")["PythonCall"] == "0.9.2"
    assert env.manifest_versions(folder, "1.10.8")["PythonCall"] == "0.9.1"


def test_records_are_kept_and_forgotten():
    record = env.Record("/opt/julia", None)
    assert env.read_record() is None
    path = env.write_record(record)
    assert env.read_record() == record
    path.write_text("not json")
    assert env.read_record() is None
    assert env.remove_record() == [path]


def test_what_the_user_has_set_stays(monkeypatch):
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", {**before, "PYTHON_JULIACALL_STARTUP_FILE": "yes"})
    env.set_defaults()
    assert os.environ["PYTHON_JULIACALL_STARTUP_FILE"] == "yes"
    assert os.environ["JULIA_CONDAPKG_BACKEND"] == "Null"
    assert os.environ["PYTHON_JULIACALL_THREADS"] == "1"
    assert os.environ["PYTHON_JULIACALL_HANDLE_SIGNALS"] == "no"


def test_several_threads_need_julia_to_handle_signals(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "JULIA_NUM_THREADS": "4"})
    env.set_defaults()
    assert os.environ["PYTHON_JULIACALL_THREADS"] == "4"
    assert os.environ["PYTHON_JULIACALL_HANDLE_SIGNALS"] == "yes"


def test_what_a_wrapper_sets_is_taken_over(make_julia, make_project, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    julia = env.describe(make_julia())
    project = make_project()
    env.point_to(env.Installation(julia, project, "here"))
    assert os.environ["JULIA_DEPOT_PATH"] == os.pathsep.join(["/a", "/b"])
    assert os.environ["PYTHON_JULIACALL_PROJECT"] == project
    assert os.environ["JULIA_PKG_OFFLINE"] == "true"


def test_the_file_runs_before_anything_is_installed(make_julia, make_project):
    """`make` asks it for the juliacall to install, with the bare interpreter."""
    executable = make_julia(project=make_project(pythoncall="0.9.30"))
    variables = {**os.environ, "PYSCIML_NODE_JULIA": executable}
    command = [sys.executable, "-S", "-I", env.__file__]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "juliacall==0.9.30"


def test_the_file_says_nothing_where_no_julia_is(tmp_path):
    nowhere = f"import runpy, sys; sys.prefix = sys.base_prefix = {str(tmp_path)!r}; "
    script = nowhere + f"runpy.run_path({env.__file__!r}, run_name='__main__')"
    variables = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_the_record_is_plain_json():
    path = env.write_record(env.Record("julia", "/project"))
    assert json.loads(path.read_text()) == {"julia": "julia", "project": "/project"}


def test_copies_of_the_package_compile_into_folders_of_their_own(monkeypatch, tmp_path):
    here = env.compiled_folder()
    monkeypatch.setattr(env, "bundled_project", lambda: tmp_path)
    assert env.compiled_folder() != here
    assert env.compiled_folder().parent == here.parent == env.record_paths()[0].parent


def test_a_read_only_environment_compiles_into_the_users_folder(monkeypatch, tmp_path):
    places = (tmp_path / "own" / "julia.json", tmp_path / "user" / "julia.json")
    monkeypatch.setattr(env, "record_paths", lambda: places)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert env.compiled_folder().parent == tmp_path / "user"


def test_packages_without_files_and_packages_without_compiled_files_are_told_apart(tmp_path):
    project, depot = tmp_path / "project", tmp_path / "depot"
    project.mkdir()
    entries = {
        "Here": 'git-tree-sha1 = "a"',
        "Fresh": 'git-tree-sha1 = "b"',
        "Gone": 'git-tree-sha1 = "c"',
        "Own": 'path = "own"',
        "LinearAlgebra": "",
    }
    lines = ['manifest_format = "2.0"']
    for name, entry in entries.items():
        lines += [f"[[deps.{name}]]", entry]
    (project / "Manifest.toml").write_text("\n".join(lines) + "\n")
    for name in ("Here", "Fresh"):
        (depot / "packages" / name / "slug" / "src").mkdir(parents=True)
        (depot / "packages" / name / "slug" / "src" / f"{name}.jl").touch()
    (depot / "compiled" / "v1.10" / "Here").mkdir(parents=True)
    (depot / "compiled" / "v1.10" / "Here" / "x.ji").touch()
    (project / "own" / "src").mkdir(parents=True)
    (project / "own" / "src" / "Own.jl").touch()
    found = env.absent_packages(project, "1.10.8", [str(depot)], entries)
    assert found == (["Gone"], ["Fresh", "Own"])
