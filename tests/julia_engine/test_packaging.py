"""What is shipped: the Julia package, and what juliapkg is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from pysciml_node.julia_engine.process import env

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = json.loads(
    (ROOT / "pysciml_node" / "julia_engine" / "requirements.json").read_text()
)
PROJECT = (ROOT / "julia" / "Project.toml").read_bytes()
U = "7876af07-990d-54b4-ab0e-23690620f79a"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and a source distribution."""
    sdist = pytest.importorskip("hatchling.builders.sdist")
    wheel = pytest.importorskip("hatchling.builders.wheel")
    folder = str(tmp_path_factory.mktemp("dist"))
    return (
        Path(next(wheel.WheelBuilder(str(ROOT)).build(directory=folder, versions=["standard"]))),
        Path(next(sdist.SdistBuilder(str(ROOT)).build(directory=folder, versions=["standard"]))),
    )


def julia_files() -> set[str]:
    return {
        file.relative_to(ROOT / "julia").as_posix()
        for folder in ("src", "ext", "test")
        for file in (ROOT / "julia" / folder).rglob("*.jl")
    } | {"Project.toml"}


def test_the_wheel_holds_the_julia_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert "pysciml_node/julia_engine/requirements.json" in names
    # juliapkg would install what this lists for every other user of Julia in the environment.
    assert not any(name.endswith("juliapkg.json") for name in names)
    assert {f"pysciml_node/julia/{file}" for file in julia_files()} <= set(names)
    assert len(names) == len(set(names))
    assert not any("Manifest" in name for name in names)


def test_the_wheel_holds_what_users_import_and_no_experiments(built):
    names = {n for n in zipfile.ZipFile(built[0]).namelist() if n.endswith(".py")}
    sources = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "pysciml_node").rglob("*.py")
        if "experiments" not in file.parts
    }
    assert names == sources


def test_the_source_distribution_holds_it_too(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"pysciml_node/julia/{file}" for file in julia_files()} <= names


LIST = """
import json
from juliapkg import deps
from pysciml_node.julia_engine.process import launch, registration
steps = [deps.find_requirements()[1]]
registration.register()
steps.append(deps.find_requirements()[1])
state = [registration.registered(), launch.resolved()]
removed = [registration.unregister(), registration.unregister()]
steps.append(deps.find_requirements()[1])
print(json.dumps({
    "names": [sorted(package.name for package in step) for step in steps],
    "paths": [package.path for package in steps[1] if package.dev],
    "state": state, "removed": removed, "left": deps.load_cur_deps(),
}))
"""


@pytest.mark.parametrize("place", ["checkout", "wheel"])
@pytest.mark.parametrize("other", [None, {"julia": "1.11", "packages": {"Example": {"uuid": U}}}])
def test_juliapkg_gets_the_packages_when_asked_for_alone(place, other, built, tmp_path):
    """No Julia is needed, and nothing is installed. Other packages' needs stay as they are."""
    source = ROOT
    if place == "wheel":
        source = tmp_path / "site"
        with zipfile.ZipFile(built[0]) as archive:
            archive.extractall(source)
    listed = tmp_path / "project" / "pyjuliapkg" / "juliapkg.json"
    if other is not None:
        listed.parent.mkdir(parents=True)
        listed.write_text(json.dumps(other))
    variables = {
        **os.environ,
        "PYTHONPATH": str(source),
        "PYTHON_JULIAPKG_PROJECT": str(tmp_path / "project"),
    }
    done = subprocess.run(
        [sys.executable, "-c", LIST],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    before, during, after = map(set, seen["names"])
    assert before == after
    assert during - before == set(REQUIREMENTS["packages"])
    (path,) = seen["paths"]
    assert (Path(path) / "Project.toml").is_file()
    assert Path(path).resolve().is_relative_to(source.resolve())
    assert (seen["state"], seen["removed"]) == ([True, False], [True, False])
    assert seen["left"] == (other or {})


def test_both_descriptions_of_the_julia_side_agree():
    project = tomllib.loads(PROJECT.decode())
    ours = REQUIREMENTS["packages"]["PySciMLNode"]
    assert (ours["uuid"], ours["dev"], ours["path"]) == (project["uuid"], True, "../julia")
    assert REQUIREMENTS["julia"] == project["compat"]["julia"]
    known = {**project["deps"], **project.get("weakdeps", {})}
    for name, package in REQUIREMENTS["packages"].items():
        if name in known and name != "PySciMLNode":
            assert package["uuid"] == known[name]
            assert package["version"] == project["compat"][name]
    # CUDA comes with `install --cuda`; whatever else extends the package is installed with it.
    assert set(project.get("weakdeps", {})) - {"CUDA"} <= set(REQUIREMENTS["packages"])


def test_the_bundled_project_has_one_place():
    assert env.bundled_project() == (ROOT / "julia").resolve()
    assert (ROOT / "pysciml_node" / "julia").resolve() == (ROOT / "julia").resolve()
    assert set(env.needed_packages()) >= {"PythonCall", "SciMLBase", "OrdinaryDiffEqTsit5"}
