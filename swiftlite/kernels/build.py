"""The C++ kernels: compiled once per machine by the system's compiler, cached, loaded through ctypes.

Nothing happens at import. The first use on a machine compiles (seconds); the library's name carries a hash of the
sources, the compiler, its flags and the CPU, so a change of any makes another file, and a rename puts it in place whole, so
processes may race. The directory belongs to the user alone, because what lies in it is run. Without a working compiler the
reason is printed and torch is used instead.
This module does not know what the kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARIES = {  # training needs the first alone, which compiles in 3 s where the second takes 10 on two cores
    "steps": ("fused.cpp", "gradients.cpp", "lowrank.cpp", "segments.cpp"),
    "engine": ("stages.cpp", "paged_attention.cpp", "linear.cpp", "experts.cpp", "int8.cpp", "lora.cpp", "adapted.cpp", "lora_files.cpp"),
}
HEADERS = (
    *("vectors.h", "amx.h", "panels.h", "unit.h", "linear.h", "steps.h", "stage.h", "adapters.h"),
    *("attention.h", "attention_rows.h", "attention_unit.h", "attention_tiles.h"),
)
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-w")


class Unavailable(Exception):
    """Why there are no kernels here."""


@functools.cache
def load_library(name: str = "engine") -> ctypes.CDLL | None:
    """One of the LIBRARIES, or None where it cannot be built; the reason is printed once. SWIFTLITE_KERNELS=0 turns all off."""
    if os.environ.get("SWIFTLITE_KERNELS") == "0":
        return _none("off (SWIFTLITE_KERNELS=0), torch is used instead")
    try:
        return ctypes.CDLL(str(build(name)))
    except (Unavailable, OSError) as error:
        return _none(f"not available ({error}); torch is used instead, which is slower")


@functools.cache
def _none(reason: str) -> None:
    print(f"kernels: {reason}")  # once, for all libraries


def build(name: str = "engine", directory: Path | None = None, target: tuple[str, ...] = ()) -> Path:
    """Path of a compiled library, compiled now unless it is cached. Unavailable says why it cannot be.

    `target` are compiler flags for another instruction set than this machine's (tests).
    """
    names = os.environ.get("CXX", ""), "c++", "g++", "clang++"
    compiler = next(filter(None, (shutil.which(command) for command in names if command)), None)
    if compiler is None:
        raise Unavailable("no C++ compiler: set CXX or install g++")
    flags = [*FLAGS, *(target or ("-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",))]
    here, sources = Path(__file__).parent, LIBRARIES[name]
    key = hashlib.sha256()
    for file in (*sources, *HEADERS):
        key.update((here / file).read_bytes())
    runtime = openmp_runtime()
    key.update("\0".join([compiler, _version(compiler), *flags, runtime or "", cpu_name()]).encode())
    folder = directory or cache_directory()
    path = folder / f"{name}-{key.hexdigest()[:24]}.so"
    if path.is_file():
        return path
    if directory is None:
        print(f"kernels: compiling C++ for this machine ({name}; once, some seconds) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects = [str(Path(work) / f"{file}.o") for file in sources]
        commands = [[compiler, *flags, "-c", str(here / file), "-o", to] for file, to in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(_run, commands))
        # Two OpenMP runtimes in one process would fight over the cores, so the one that torch brought is linked by its path.
        _run([compiler, "-shared", *objects, runtime or "-fopenmp", "-o", str(Path(work) / "kernels.so")])
        os.replace(Path(work) / "kernels.so", path)
    return path


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise Unavailable(f"{command[0]} failed: {lines[0].strip() if lines else f'exit code {done.returncode}'}")


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} does not run: {error}") from error


def cpu_name() -> str:
    """What tells this CPU's instruction set from another's: a cache directory may be shared between machines."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    return platform.processor()


def openmp_runtime() -> str | None:
    """Path of the OpenMP library that torch has loaded into this process."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6}
    found = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")))
    return found[0] if found else None


def cache_directory() -> Path:
    """A directory that only this user can write to."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "swiftlite" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"{folder} cannot be made: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise Unavailable(f"{folder} can be written by others")
    return folder
