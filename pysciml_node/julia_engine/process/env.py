"""The choice of a Julia and its project, by variables, by a record and by the path.

This file uses the standard library only and imports nothing of the package, so that the Makefile
can run it before anything is installed (`python env.py` prints the juliacall that the Julia
project found here needs).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

JULIA_VARIABLE = "PYSCIML_NODE_JULIA"
PROJECT_VARIABLE = "PYSCIML_NODE_JULIA_PROJECT"
OLDEST_JULIA = (1, 10, 8)
FIRST_UNSUPPORTED_JULIA = (1, 12)

# Zygote does not run on 1.12; 1.10.8 is the first to read manifests named after a version.
SUPPORTED_JULIA = "1.10.8 or newer, below 1.12"

# What an embedded Julia does unless the user has set something else.
_DEFAULTS = {
    "PYTHON_JULIACALL_STARTUP_FILE": "no",
    "PYTHON_JULIACALL_AUTOLOAD_IPYTHON_EXTENSION": "no",
    "JULIA_CONDAPKG_BACKEND": "Null",  # Python is here already
    "JULIA_CUDA_USE_COMPAT": "false",  # one CUDA driver in a process
    "JULIA_CUDA_SOFT_MEMORY_LIMIT": "40%",  # torch keeps a pool of its own
}


# Not called juliapkg.json: juliapkg would install all of it for whatever else uses juliacall in
# this Python environment. `install` registers it when asked.
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.json"


@dataclass(frozen=True)
class Julia:
    """An executable, as it describes itself.

    Attributes:
        executable: what was run; a wrapper is as good as the program.
        version: e.g. `"1.10.8"`.
        bindir: where the program lives.
        library: libjulia.
        project: the project that is active when none is named.
        depots: where packages are, in the order in which they are searched.
    """

    executable: str
    version: str
    bindir: str
    library: str
    project: str
    depots: tuple[str, ...]

    @property
    def supported(self) -> bool:
        """Whether the engine runs on this version."""
        numbers = tuple(int(part) for part in self.version.partition("-")[0].split(".")[:3])
        return OLDEST_JULIA <= numbers < FIRST_UNSUPPORTED_JULIA


@dataclass(frozen=True)
class Installation:
    """A Julia and a project that exist already, and who named them.

    Attributes:
        julia: the executable.
        project: folder of the project.
        source: where the choice comes from, in words.
    """

    julia: Julia
    project: str
    source: str


@dataclass(frozen=True)
class Choice:
    """The Julia that the engine would start, or the reason why there is none yet.

    Attributes:
        installation: an existing Julia with a project that fits; None when juliapkg's environment
            is to be used, or when nothing fits.
        problem: what is wrong with what the user named, and the remedy; None when nothing is.
        executable: the Julia that juliapkg is to use, when the user named one.
        notes: what else was looked at, and why it was passed over.
    """

    installation: Installation | None = None
    problem: str | None = None
    executable: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The choice that `install --julia` wrote down.

    Attributes:
        julia: the executable.
        project: folder of the project; None when juliapkg makes one.
    """

    julia: str
    project: str | None = None


def bundled_project() -> Path:
    """Folder of the Julia package that comes with this one."""
    return (Path(__file__).resolve().parents[2] / "julia").resolve()


def _home() -> Path:
    """The folder of this user's settings."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def record_paths() -> tuple[Path, ...]:
    """The places of a record, in the order of reading; it is written to the first.

    A virtual or conda environment has a record of its own.
    """
    name = Path("pysciml_node") / "julia.json"
    isolated = sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()
    user = _home() / name
    return (Path(sys.prefix) / "share" / name, user) if isolated else (user,)


def compiled_folder() -> Path:
    """The folder of the files that Julia compiles for this copy of the package.

    Julia names compiled files after the active project. Copies of the package that share a project
    would therefore replace each other's, and each would compile at every start. A separate folder
    also serves where the project's depot cannot be written.
    """
    digest = hashlib.sha256(os.fsencode(bundled_project())).hexdigest()[:12]
    folder = record_paths()[0].parent
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(nearest, os.W_OK):
        folder = record_paths()[-1].parent
    return folder / f"julia-{digest}"


def read_record() -> Record | None:
    """The record of `install --julia`, if there is one that can be read."""
    for path in record_paths():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Record(str(content["julia"]), content.get("project"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def write_record(record: Record) -> Path:
    """Keep `record` for this environment.

    Returns:
        The file it is in.
    """
    path = record_paths()[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    return path


def remove_record() -> list[Path]:
    """Forget every record; returns the files that were removed."""
    records = [path for path in record_paths() if path.exists()]
    for path in records:
        path.unlink()
    return records


_DESCRIBE = (
    'import Libdl; print(join((VERSION, Sys.BINDIR, abspath(Libdl.dlpath("libjulia")), '
    'dirname(something(Base.active_project(), "")), join(DEPOT_PATH, "\\n")), "\\0"))'
)


@lru_cache(maxsize=8)
def describe(executable: str) -> Julia | str:
    """Run an executable and let it describe itself, which takes a third of a second.

    Args:
        executable: a path, or a name on the path.

    Returns:
        Its description, or in words why there is none.
    """
    path = shutil.which(executable)
    if path is None:
        return f"{executable!r} is no executable"
    command = [path, "--startup-file=no", "-O0", "--compile=min", "-e", _DESCRIBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        version, bindir, library, project, depots = done.stdout.split("\0")
        julia = Julia(path, version, bindir, library, project, tuple(depots.split("\n")))
        int(version.split(".")[0])
    except subprocess.CalledProcessError as error:
        return f"{path} failed: {(error.stderr or '').strip()[:300] or error}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{path} does not answer as Julia does ({error})"
    if not julia.supported:
        return f"{path} is Julia {version}; the engine needs {SUPPORTED_JULIA}"
    return julia


def manifest_versions(project: str | Path, julia_version: str = "") -> dict[str, str]:
    """Versions of the packages in a project's manifest.

    Args:
        project: folder of the project.
        julia_version: selects among manifests named after a version of Julia.

    Returns:
        Versions by name, empty where a package has none; an empty dictionary without a manifest.
    """
    entries = manifest_entries(project, julia_version)
    return {name: entry.get("version", "") for name, entry in entries.items()}


def manifest_entries(project: str | Path, julia_version: str = "") -> dict[str, dict[str, str]]:
    """The packages in a project's manifest, by name; the arguments are those of its versions."""
    minor = ".".join(julia_version.split(".")[:2])
    names = (f"JuliaManifest-v{minor}", f"Manifest-v{minor}", "JuliaManifest", "Manifest")
    for name in names:
        try:
            content = tomllib.loads((Path(project) / f"{name}.toml").read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError:
            return {}
        packages: dict[str, list[dict[str, str]]] = content.get("deps", {})
        return {name: entries[0] for name, entries in packages.items()}
    return {}


def absent_packages(
    project: str | Path, julia_version: str, depots: Sequence[str], names: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The packages of a manifest that are not there, and those that have not been compiled.

    Args:
        project: folder of the project.
        julia_version: of the Julia that runs it.
        depots: folders of packages and their compiled files.
        names: of packages in the manifest.

    Returns:
        Those without their files, and those that would be compiled at the first solve that needs
        them.
    """
    entries = manifest_entries(project, julia_version)
    minor = "v" + ".".join(julia_version.split(".")[:2])
    folders = [*map(Path, depots), compiled_folder()]
    without, uncompiled = [], []
    for name in names:
        entry = entries[name]
        if "path" in entry:
            there = (Path(project) / entry["path"] / "src" / f"{name}.jl").is_file()
        elif "git-tree-sha1" in entry:
            there = any(any(folder.glob(f"packages/{name}/*/src/{name}.jl")) for folder in folders)
        else:
            continue  # it comes with Julia
        if not there:
            without.append(name)
        elif not any(any(folder.glob(f"compiled/{minor}/{name}/*.ji")) for folder in folders):
            uncompiled.append(name)
    return without, uncompiled


def needed_packages() -> tuple[str, ...]:
    """The Julia packages without which the engine does not start."""
    project = tomllib.loads((bundled_project() / "Project.toml").read_text(encoding="utf-8"))
    return tuple(project.get("deps", {}))


def optional_packages() -> tuple[str, ...]:
    """The Julia packages that are loaded when a solve asks for them."""
    content = json.loads(REQUIREMENTS.read_text(encoding="utf-8"))
    return tuple(name for name, package in content["packages"].items() if not package.get("dev"))


def juliacall_version() -> str | None:
    """Version of the installed juliacall; it is not imported."""
    try:
        return metadata.version("juliacall")
    except metadata.PackageNotFoundError:
        return None


def misfit(julia: Julia, project: str) -> str | None:
    """Why the engine cannot run in an existing project, with the remedy; None when it can."""
    if not Path(project).is_dir():
        return f"the project {project!r} is no folder.\n  Name the one that has a Project.toml."
    versions = manifest_versions(project, julia.version)
    if not versions:
        return (
            f"the project {project} has no readable manifest.\n"
            f"  Make one: {julia.executable} --project={project} -e 'using Pkg; Pkg.instantiate()'"
        )
    missing = [name for name in needed_packages() if name not in versions]
    if missing:
        return (
            f"the project {project} lacks {', '.join(missing)}.\n"
            f"  Add what is missing: {julia.executable} --project={project} -e "
            f"'using Pkg; Pkg.add({json.dumps(missing)})'"
        )
    installed = juliacall_version()
    if installed is not None and installed != versions["PythonCall"]:
        return (
            f"the project {project} holds PythonCall {versions['PythonCall']}, which needs "
            f"juliacall of the same version, but juliacall {installed} is installed.\n"
            f"  Run: pip install juliacall=={versions['PythonCall']}"
        )
    return None


def _named() -> Iterator[tuple[str, str, str | None]]:
    """The choices of the user: where each was made, the executable, and the project if any."""
    executable = os.environ.get("PYTHON_JULIACALL_EXE")
    project = os.environ.get("PYTHON_JULIACALL_PROJECT")
    if executable and project:
        yield "PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT", executable, project
    record = read_record()
    named, project = os.environ.get(JULIA_VARIABLE), os.environ.get(PROJECT_VARIABLE)
    if named:
        yield JULIA_VARIABLE, named, project
    elif project:
        yield PROJECT_VARIABLE, record.julia if record else "julia", project
    if record:
        yield "the record of `install --julia`", record.julia, record.project


def choose(*, search_path: bool = True) -> Choice:
    """Decide what to start. From the strongest to the weakest:

    1. `PYTHON_JULIACALL_EXE` with `PYTHON_JULIACALL_PROJECT`;
    2. `PYSCIML_NODE_JULIA` with `PYSCIML_NODE_JULIA_PROJECT`, either alone or both;
    3. what `install --julia PATH [--project PATH]` has recorded;
    4. the environment that `install` has made (by juliapkg);
    5. the `julia` on the path, if the project that is active in it holds what is needed.

    Args:
        search_path: whether step 5 is taken; not where step 4 succeeded.
    """
    for source, executable, project in _named():
        julia = describe(executable)
        if isinstance(julia, str):
            remedy = f"Name a Julia that is {SUPPORTED_JULIA}."
            return Choice(problem=f"{julia} (named by {source}).\n  {remedy}")
        why = misfit(julia, project or julia.project)
        if why is None:
            return Choice(Installation(julia, project or julia.project, source))
        if project:
            return Choice(problem=f"{why}\n  (Named by {source}.)")
        # A Julia without a project of its own: juliapkg makes one for it.
        return Choice(executable=julia.executable, notes=(f"{source}: {why}",))
    if not search_path:
        return Choice()
    julia = describe("julia")
    if isinstance(julia, str):
        return Choice(notes=(julia,))
    why = misfit(julia, julia.project)
    if why is None:
        return Choice(Installation(julia, julia.project, "the julia on the path"))
    return Choice(notes=(f"the julia on the path: {why}",))


def threads() -> str:
    """The number of threads Julia is to start with, as juliacall takes it."""
    option = sys._xoptions.get("juliacall-threads")
    if isinstance(option, str):
        return option
    environment = os.environ
    return (
        environment.get("PYTHON_JULIACALL_THREADS") or environment.get("JULIA_NUM_THREADS") or "1"
    )


def set_defaults() -> None:
    """Set what the user has left open for juliacall and Julia, before either is loaded."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    count = threads()
    os.environ.setdefault("PYTHON_JULIACALL_THREADS", count)
    # Several threads of Julia stop one another for garbage collection by signals.
    several = count not in ("1", "1,0")
    os.environ.setdefault("PYTHON_JULIACALL_HANDLE_SIGNALS", "no")
    if several:
        # A "no" here, perhaps inherited from a process with one thread, would end in a crash.
        os.environ["PYTHON_JULIACALL_HANDLE_SIGNALS"] = "yes"


def take_over(julia: Julia) -> None:
    """Use the depots of an executable, which a wrapper round it may have set."""
    os.environ.setdefault("JULIA_DEPOT_PATH", os.pathsep.join(julia.depots))


def point_to(installation: Installation) -> None:
    """Make juliacall start an existing installation, without reaching for the network."""
    julia = installation.julia
    os.environ["PYTHON_JULIACALL_EXE"] = julia.executable
    os.environ["PYTHON_JULIACALL_PROJECT"] = installation.project
    take_over(julia)
    os.environ.setdefault("JULIA_PKG_OFFLINE", "true")
    # From 0.9.35 on, juliacall then need not run Julia once more to ask.
    os.environ.setdefault("PYTHON_JULIACALL_LIB", julia.library)
    os.environ.setdefault("PYTHON_JULIACALL_BINDIR", julia.bindir)


def required_juliacall() -> str | None:
    """The juliacall that the existing project found here needs, for `make`'s environment."""
    for executable, project in [(e, p) for _, e, p in _named()] or [("julia", None)]:
        julia = describe(executable)
        if isinstance(julia, Julia):
            version = manifest_versions(project or julia.project, julia.version).get("PythonCall")
            if version:
                return version
    return None


if __name__ == "__main__":
    version = required_juliacall()
    if version is not None:
        print(f"juliacall=={version}")
