"""A C compiler, found at run time, and the libraries that it has made."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pysciml_node.errors import CompileError

# Nothing here lets the compiler assume that numbers are finite or sums may be reordered at will:
# the loop's checks for NaN have to hold. Sums that may be are marked in the code (omp simd).
# Vectors are made of loops and not of neighbouring statements, of which gcc 12 has mixed some up.
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fno-tree-slp-vectorize",
    "-w",
)
APART = "/* Products and sums are rounded apart. */"
"""A line by which code asks for it; elsewhere they may be one operation, which is quicker."""

_NATIVE = ("-march=native",)
_WIDE = ("-mprefer-vector-width=512",)
_MAGIC = b"psn1"


@dataclass(frozen=True)
class Compiler:
    """A compiler that works here.

    Attributes:
        command: what is run.
        version: its first line of `--version`.
        flags: for this machine's processor.
    """

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The command as one word."""
        return " ".join(self.command)


def _commands() -> list[tuple[str, ...]]:
    """Compilers in the order in which they are tried: `PSN_CC`, the system's, the wheel."""
    chosen = os.environ.get("PSN_CC")
    if chosen:
        return [tuple(shlex.split(chosen))]
    commands: list[tuple[str, ...]] = [
        (path,) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))
    ]
    if find_spec("ziglang") is not None:
        commands.append((sys.executable, "-m", "ziglang", "cc"))
    return commands


def _run(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def _works(command: tuple[str, ...], flags: tuple[str, ...]) -> str | None:
    """What is wrong with a compiler, if anything."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <math.h>\ndouble probe(double x) { return sin(x); }\n")
        try:
            run = _run([*command, *flags, str(source), "-o", str(source.with_suffix(".so")), "-lm"])
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command[0]} does not run: {error}"
    return None if run.returncode == 0 else f"{command[0]} fails: {run.stderr.strip()[:300]}"


@functools.cache
def find_compiler() -> Compiler | str:
    """The first compiler that works, or why there is none; remembered for the process."""
    if os.name != "posix":
        return "native code is made on Linux and macOS only"
    reasons = []
    for command in _commands():
        reason = None
        for extra in ((*_NATIVE, *_WIDE), _NATIVE, ()):
            flags = (*FLAGS, *_sanitizers(), *extra)
            reason = _works(command, flags)
            if reason is None:
                version = _run([*command, "--version"]).stdout.partition("\n")[0]
                return Compiler(command, version, flags)
        reasons.append(reason or "")
    return "; ".join(reasons) or "no C compiler (cc, gcc, clang) was found"


def _sanitizers() -> tuple[str, ...]:
    """Checks compiled into native code, for its tests: `PSN_NATIVE_SANITIZE=address,undefined`.

    Little is optimized around them, for that takes compilers many times as long.
    """
    chosen = os.environ.get("PSN_NATIVE_SANITIZE")
    if not chosen:
        return ()
    checks = (f"-fsanitize={chosen}", "-fno-sanitize-recover=all")
    return (*checks, "-O1", "-fno-omit-frame-pointer", "-g1")


def available() -> tuple[bool, str]:
    """Whether native code can be made here, and the compiler or the reason."""
    compiler = find_compiler()
    return (False, compiler) if isinstance(compiler, str) else (True, compiler.name)


@functools.cache
def _processor() -> str:
    """What tells processors apart that run different instructions."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lines = text.partition("\n\n")[0].splitlines()
        keep = ("model name", "flags", "Features", "CPU part")
        return "\n".join(line for line in lines if line.startswith(keep))
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where libraries are kept; made if it is missing, for this user alone.

    Raises:
        CompileError: it belongs to somebody else, or others may write to it.
    """
    base = os.environ.get("PSN_NATIVE_CACHE")
    if base is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = str(Path(root, "pysciml_node", "native"))
    folder = Path(base)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise CompileError(
            f"the folder for native code, {folder}, cannot be used: {error}.\n"
            "  Set PSN_NATIVE_CACHE to a folder of yours."
        ) from error
    if not _private(status):
        raise CompileError(
            f"the folder for native code, {folder}, belongs to somebody else, or others may write "
            "to it.\n  Set PSN_NATIVE_CACHE to a folder of yours (chmod go-w)."
        )
    return folder


def cached() -> list[Path]:
    """The libraries that are kept.

    Raises:
        CompileError: as `cache_folder`.
    """
    return sorted(cache_folder().glob("*.so"))


def clear() -> int:
    """Remove the libraries that are kept; those that a process has loaded go on there.

    Returns:
        How many they were.

    Raises:
        CompileError: as `cache_folder`.
    """
    libraries = cached()
    for library in libraries:
        library.unlink(missing_ok=True)
    return len(libraries)


def _private(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _seal(data: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(data).digest()


def _is_whole(path: Path) -> bool:
    """Whether a library is ours, and as it was written: its seal follows it."""
    try:
        if path.is_symlink() or not _private(path.stat()):
            return False
        content = path.read_bytes()
    except OSError:
        return False
    size = len(_MAGIC) + hashlib.sha256().digest_size
    return len(content) > size and content[-size:] == _seal(content[:-size])


def build(source: str) -> ctypes.CDLL:
    """Compile C, or load what was made of the same text before, by any process.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    if isinstance(compiler, str):
        raise CompileError(
            f"native code needs a C compiler, but {compiler}.\n"
            "  Install one (gcc or clang), or pip install 'pysciml_node[native]', or solve with "
            "compile=False."
        )
    parts = (source, *_flags(compiler, source), compiler.name, compiler.version, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
    path = cache_folder() / f"{name}.so"
    if not _is_whole(path):
        _compile(compiler, source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(
            f"native code cannot be loaded: {error}.\n"
            "  Is the folder mounted noexec? Set PSN_NATIVE_CACHE to another one."
        ) from error


def _flags(compiler: Compiler, source: str) -> tuple[str, ...]:
    return (*compiler.flags, "-ffp-contract=off") if APART in source else compiler.flags


def _compile(compiler: Compiler, source: str, path: Path) -> None:
    # A folder of its own in the cache: the library is moved into place whole, whoever is first.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
        text, library = Path(folder, "solve.c"), Path(folder, "solve.so")
        text.write_text(source, encoding="utf-8")
        try:
            flags = _flags(compiler, source)
            run = _run([*compiler.command, *flags, str(text), "-o", str(library), "-lm"])
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(
                f"{compiler.name} does not finish: {error}\n  Solve with compile=False."
            ) from error
        if run.returncode != 0:
            raise CompileError(
                f"{compiler.name} cannot compile the solve: {run.stderr.strip()[:500]}\n"
                "  Solve with compile=False."
            )
        data = library.read_bytes()
        library.write_bytes(data + _seal(data))
        library.chmod(0o600)
        os.replace(library, path)
