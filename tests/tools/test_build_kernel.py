"""`nnscaler-ring build-kernel`, with a compiler and without one."""

import json

import pytest
from click.testing import CliRunner

from nnscaler_ring.core.kernels.native import library
from nnscaler_ring.tools.commands import commands
from tests.core.kernels.native.test_library import has_compiler, small  # noqa: F401


def run(*args: str):
    return CliRunner().invoke(commands, ["build-kernel", *args])


@pytest.mark.usefixtures("has_compiler")
def test_it_says_what_was_compiled_and_where():
    for _ in range(2):
        done = run()
        assert done.exit_code == 0
        assert done.output.startswith("kernel cpu_tiles: compiled for better, in ")
    assert library.describe() in run("--optional").output


def test_without_a_compiler_it_fails_unless_it_is_optional(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    done = run()
    assert done.exit_code == 1 and "Error: the C++ compiler /no/such/compiler" in done.output
    done = run("--optional")
    assert done.exit_code == 0
    assert "cpu_tiles is not compiled: the C++ compiler /no/such/compiler" in done.output
    assert 'kernel="auto" does without it' in done.output


@pytest.mark.usefixtures("has_compiler")
def test_a_library_that_does_not_load_is_an_error(small):  # noqa: F811
    (small / "tiles.cpp").write_text("int nothing;")
    done = run()
    assert done.exit_code == 1 and "does not load" in done.output


def test_as_json(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    facts = json.loads(run("--optional", "--json").output)
    assert facts["compiled"] is False and "/no/such/compiler" in facts["reason"]
