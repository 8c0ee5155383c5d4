"""Compiles the C++ kernel, once per instruction set. Needs the standard library alone: setup.py
runs it as a file, before there is a torch."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
"""From the least to the best, and the flags of each; the library says which a machine can run."""

if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mtune=generic"],
        "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mtune=generic"],
    }

FLAGS = [
    *("-O3", "-fPIC", "-shared", "-std=c++17", "-pthread", "-fvisibility=hidden", "-w", "-s"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-ffp-contract=fast"),
]


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says which and why."""


def sources_hash() -> str:
    """Of all C++ sources and flags: a library of other ones is not loaded."""
    digest = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS)).encode())
    for source in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def library_name(instruction_set: str) -> str:
    """The file of one instruction set."""
    return f"cpu_tiles_{instruction_set}.so"


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else g++, clang++ or c++ from the PATH.

    Raises:
        BuildError: there is none.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler found: neither $CXX nor g++, clang++ or c++ on the PATH")


def build_into(folder: Path) -> Path:
    """Compile every instruction set, all at once, into a folder that appears when all are done.

    Of several processes that build the same at a time one wins, and all use its libraries.

    Raises:
        BuildError: as its message says.
    """
    command = compiler()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        unfinished = Path(temporary) / "libraries"
        unfinished.mkdir()
        compile_into(unfinished, command)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def compile_into(folder: Path, command: list[str] | None = None) -> None:
    """Compile every instruction set, all at once, into a folder that nobody reads yet.

    Raises:
        BuildError: as its message says.
    """
    command = command or compiler()
    jobs = {}
    for name, flags in INSTRUCTION_SETS.items():
        defined = f'-DSOURCES="{sources_hash()}"'
        outputs = [str(SOURCES / "tiles.cpp"), "-o", str(folder / library_name(name))]
        try:
            jobs[name] = subprocess.Popen(
                [*command, *FLAGS, *flags, defined, *outputs], stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise BuildError(
                f"the C++ compiler {shlex.join(command)} cannot run: {error}"
            ) from error
    errors = {name: job.communicate()[1] for name, job in jobs.items()}
    if failed := [name for name, job in jobs.items() if job.returncode]:
        for name in INSTRUCTION_SETS:
            (folder / library_name(name)).unlink(missing_ok=True)
        said = errors[failed[0]][:500].strip()
        raise BuildError(f"{shlex.join(command)} failed for {', '.join(failed)}: {said}")


def compiler_hash(command: list[str]) -> str:
    """Of the command and what it says of its version.

    Raises:
        BuildError: it cannot run.
    """
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} cannot run: {error}") from error
    return hashlib.sha256(repr((command, done.stdout)).encode()).hexdigest()[:16]
