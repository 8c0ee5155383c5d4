"""Finds and loads the compiled kernel: beside the sources in a wheel, else in the user's cache."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from nnscaler_ring.core.kernels.native.build import (
    INSTRUCTION_SETS,
    SOURCES,
    build_into,
    compiler,
    compiler_hash,
    library_name,
    sources_hash,
)


class Library(NamedTuple):
    """The loaded kernel, and the instruction set that it was compiled for."""

    functions: ctypes.CDLL
    instruction_set: str
    folder: Path


def cache_folder() -> Path:
    """Where libraries that were compiled on request are kept: below $XDG_CACHE_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "nnscaler_ring" / f"{sources_hash()}-{platform.machine()}"


def build() -> Path:
    """Compile into the cache what is not there yet, and forget what `library` has found before.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    folder = cache_folder() / compiler_hash(compiler())
    if not folder.is_dir():
        build_into(folder)
    library.cache_clear()
    return folder


@lru_cache
def library(instruction_set: str | None = None) -> Library | str:
    """The kernel for the best instruction set here, or for another that runs here.

    Returns:
        The library, or the reason why there is none.
    """
    reason = "it is not compiled here; `nnscaler-ring build-kernel` does that, with a C++ compiler"
    for folder in _folders():
        try:
            best = _load(folder, "baseline")
            name = instruction_set or best.instruction_set
            if list(INSTRUCTION_SETS).index(name) > list(INSTRUCTION_SETS).index(
                best.instruction_set
            ):
                return f"this processor has {best.instruction_set} at most, not {name}"
            return best._replace(functions=_load(folder, name).functions, instruction_set=name)
        except (OSError, AttributeError) as error:  # no library, or not one of ours
            reason = f"its library does not load: {error}"
    return reason


def describe() -> str:
    """One line for people: the instruction set and where the library is, or why there is none."""
    found = library()
    if isinstance(found, str):
        return found
    return f"compiled for {found.instruction_set}, in {found.folder}"


def _folders() -> Iterator[Path]:
    if (SOURCES / library_name("baseline")).exists():
        yield SOURCES
    cache = cache_folder()
    if cache.is_dir():
        yield from sorted(f for f in cache.iterdir() if not f.name.startswith("."))


def _load(folder: Path, instruction_set: str) -> Library:
    """Raises OSError where it cannot, and for a library of other sources."""
    path = folder / library_name(instruction_set)
    functions = ctypes.CDLL(str(path))
    for function in (functions.nnscaler_ring_sources, functions.nnscaler_ring_instruction_set):
        function.restype = ctypes.c_char_p
    if functions.nnscaler_ring_sources().decode() != sources_hash():
        raise OSError(f"{path} is of other sources")
    return Library(functions, functions.nnscaler_ring_instruction_set().decode(), folder)
