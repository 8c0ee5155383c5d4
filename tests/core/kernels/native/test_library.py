"""How the C++ kernel is compiled, kept and found; with small sources, or none at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnscaler_ring
from nnscaler_ring.core.kernels.native import build, library
from nnscaler_ring.core.kernels.native.build import BuildError, build_into, compiler, library_name

LEAST = """
#pragma GCC visibility push(default)
extern "C" const char* nnscaler_ring_sources() { return SOURCES; }
extern "C" const char* nnscaler_ring_instruction_set() { return "better"; }
extern "C" int nnscaler_ring_attention() { return NUMBER; }
"""
"""A library that is compiled in no time."""


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path: Path) -> Path:
    """Small sources of three instruction sets, the last not for this machine, and a new cache."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiles.cpp").write_text(LEAST)
    sets = {"baseline": ["-DNUMBER=1"], "better": ["-DNUMBER=2"], "best": ["-DNUMBER=3"]}
    for module in (build, library):
        monkeypatch.setattr(module, "SOURCES", sources)
        monkeypatch.setattr(module, "INSTRUCTION_SETS", sets)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.library.cache_clear()
    yield sources
    library.library.cache_clear()


@pytest.fixture
def has_compiler() -> None:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))


def found(instruction_set: str | None = None) -> tuple[str, int] | str:
    """The instruction set that is loaded and its number, or the reason why none is."""
    loaded = library.library(instruction_set)
    if isinstance(loaded, str):
        return loaded
    return loaded.instruction_set, loaded.functions.nnscaler_ring_attention()


def test_the_best_that_runs_is_loaded(has_compiler):
    assert "`nnscaler-ring build-kernel`" in found()
    folder = library.build()
    assert {path.name for path in folder.iterdir()} == {
        library_name(name) for name in ("baseline", "better", "best")
    }
    assert found() == ("better", 2)
    assert found("baseline") == ("baseline", 1)
    assert found("best") == "this processor has better at most, not best"


def test_a_build_that_is_there_is_kept(has_compiler):
    folder = library.build()
    before = folder.stat().st_mtime_ns
    assert library.build() == folder and folder.stat().st_mtime_ns == before


def test_other_sources_are_compiled_apart(has_compiler, small):
    first = library.build()
    (small / "tiles.cpp").write_text(LEAST.replace("NUMBER", "NUMBER + 10"))
    library.library.cache_clear()
    assert "not compiled" in found()
    assert library.build() != first
    assert found() == ("better", 12)


def test_a_library_beside_its_sources_comes_first_unless_the_sources_have_changed(
    has_compiler, small
):
    for path in build_into(small / "built").iterdir():
        path.rename(small / path.name)
    assert found() == ("better", 2)
    (small / "tiles.cpp").write_text(LEAST + "// a change")
    library.library.cache_clear()
    assert "of other sources" in found()


def test_a_broken_library_is_a_reason(has_compiler):
    (library.build() / library_name("better")).write_bytes(b"no library")
    library.library.cache_clear()
    assert "does not load" in found()


@pytest.mark.parametrize(
    ("cxx", "said"),
    [
        ("/no/such/compiler", "cannot run"),
        ("false", "cannot run"),
        ("", "no C\\+\\+ compiler found"),
    ],
)
def test_no_compiler_is_an_error_that_says_so(monkeypatch, cxx, said):
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("PATH", "/usr/bin" if cxx else "/nowhere")
    with pytest.raises(BuildError, match=said):
        library.build()


def test_a_compiler_error_is_quoted_and_leaves_nothing(has_compiler, small):
    (small / "tiles.cpp").write_text("no C++")
    with pytest.raises(BuildError, match=r"failed for baseline, better, best: .*tiles\.cpp"):
        library.build()
    assert list(library.cache_folder().iterdir()) == []


def test_processes_that_build_at_once_all_find_whole_libraries(has_compiler, small, tmp_path):
    """Each in its own folder until it is whole; one of the folders stays."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(build.__file__).parent)!r})\n"
        "import build, ctypes\n"
        f"build.SOURCES = Path({str(small)!r})\n"
        "build.INSTRUCTION_SETS = {'baseline': ['-DNUMBER=1'], 'better': ['-DNUMBER=2']}\n"
        f"folder = build.build_into(Path({str(tmp_path / 'shared' / 'here')!r}))\n"
        "for n, name in enumerate(build.INSTRUCTION_SETS, 1):\n"
        "    path = folder / build.library_name(name)\n"
        "    assert ctypes.CDLL(str(path)).nnscaler_ring_attention() == n\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["here"]


def test_import_neither_compiles_nor_looks_for_a_library():
    program = (
        "import sys, nnscaler_ring\n"
        "assert not [name for name in sys.modules if 'kernels.native' in name], sys.modules\n"
    )
    root = Path(nnscaler_ring.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
