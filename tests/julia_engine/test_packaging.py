"""What is shipped: the Julia package in wheel and source distribution, found by juliapkg."""

from __future__ import annotations

import hashlib
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
REQUIREMENTS = json.loads((ROOT / "pysciml_node" / "juliapkg.json").read_text())
PROJECT = (ROOT / "julia" / "Project.toml").read_bytes()


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
    assert "pysciml_node/juliapkg.json" in names
    assert {f"pysciml_node/julia/{file}" for file in julia_files()} <= set(names)
    assert len(names) == len(set(names))
    assert not any("Manifest" in name for name in names)


def test_the_source_distribution_holds_it_too(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"pysciml_node/julia/{file}" for file in julia_files()} <= names


FIND = """
import json, os
from juliapkg import deps
import juliapkg
_, packages = deps.find_requirements()
found = {package.name: package for package in packages}
ours = found["PySciMLNode"]
print(json.dumps({
    "files": deps.deps_files(),
    "path": ours.path,
    "project": os.path.isfile(os.path.join(ours.path, "Project.toml")),
    "dev": ours.dev,
    "packages": sorted(found),
    "resolved": juliapkg.resolve(dry_run=True),
}))
"""


def test_juliapkg_finds_it_in_a_checkout_and_in_an_installed_wheel(built, tmp_path):
    """A dry run: nothing is installed, and no Julia is needed."""
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "site")
    places = {ROOT: ROOT / "julia", tmp_path / "site": tmp_path / "site" / "pysciml_node" / "julia"}
    for place, expected in places.items():
        project = tmp_path / f"project-{place.name}"
        variables = {
            **os.environ,
            "PYTHONPATH": str(place),
            "PYTHON_JULIAPKG_PROJECT": str(project),
        }
        done = subprocess.run(
            [sys.executable, "-c", FIND],
            env=variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        assert Path(found["path"]).resolve() == expected.resolve()
        assert (found["project"], found["dev"], found["resolved"]) == (True, True, False)
        assert set(REQUIREMENTS["packages"]) <= set(found["packages"])
        assert sum(name.endswith("pysciml_node/juliapkg.json") for name in found["files"]) == 1


def test_juliapkg_resolves_again_when_the_needs_of_the_julia_project_change():
    """It looks at juliapkg.json alone, which therefore holds a digest of what is needed."""
    project = tomllib.loads(PROJECT.decode())
    needs = {name: project.get(name, {}) for name in ("deps", "weakdeps", "compat")}
    digest = hashlib.sha256(json.dumps(needs, sort_keys=True).encode()).hexdigest()
    assert REQUIREMENTS["x-needs-sha256"] == digest, (
        f"set x-needs-sha256 in pysciml_node/juliapkg.json to {digest}"
    )


def test_both_descriptions_of_the_julia_side_agree():
    project = tomllib.loads(PROJECT.decode())
    ours = REQUIREMENTS["packages"]["PySciMLNode"]
    assert (ours["uuid"], ours["dev"], ours["path"]) == (project["uuid"], True, "julia")
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
