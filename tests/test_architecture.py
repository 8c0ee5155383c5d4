"""Which room of the package may import which: imports flow down, and siblings stay strangers.

A rule that only a reader remembers is broken by the next good idea. Imports for types alone
(`if TYPE_CHECKING:`) bind nothing when the program runs, and are not counted.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnscaler_ring.core.kernels import KERNELS, offer_of

PACKAGE = "nnscaler_ring"
ROOT = Path(__file__).resolve().parent.parent

LEVELS = (
    ("core.plan",),
    ("core.sums", "core.bounded_cache"),
    ("core.ranks", "core.shape", "core.token_index"),
    ("core.scores",),
    ("core.kernels",),
    ("core.exchange",),
    ("core",),
    ("core.op",),
    ("ring_attn", "ring_attn_varlen", "zigzag_attn", "dilated_attn"),
    ("nnscaler",),
    ("",),
    ("training",),
    ("models", "dilated"),
    ("simulator",),
    ("tools",),
    ("__main__",),
)
"""Rooms from the ground up. A module imports from its own room and from lower levels: never from
above, never from a sibling of its level. A folder's room is its path, "core" its loose modules
(engine, dilated, ...), and "" the package itself; what is not named here belongs to the longest
room that is a prefix of its path, and so a new folder is a room of its own only once it stands
here."""

NNSCALER = ("nnscaler_", "policies", "cpu_runtime")
"""How the names of the modules begin that make up the room "nnscaler"."""

DOORS = {
    "nnscaler_ring.dilated.ring_attention_tester": "nnscaler_ring.tools.ring_attention_tester",
}
"""Modules that may import one module of a higher level, when somebody asks for what is there."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """The modules that a module imports, anywhere in its text, but for types alone."""
    tree = ast.parse(MODULES[module].read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


ROOMS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(module: str) -> str:
    """The longest room that a module's path begins with."""
    path = module.removeprefix(PACKAGE).removeprefix(".")
    if path.startswith(NNSCALER):
        return "nnscaler"
    while path not in ROOMS:
        path = path.rpartition(".")[0]
    return path


@pytest.mark.parametrize("module", MODULES)
def test_imports_flow_down(module: str) -> None:
    room = room_of(module)
    for imported in imports(module):
        if imported.partition(".")[0] != PACKAGE or DOORS.get(module) == imported:
            continue
        other = room_of(imported)
        assert other == room or ROOMS[other] < ROOMS[room], (
            f"{module} ({room}) imports {imported} ({other}), which does not stand below it"
        )


def test_every_room_is_there() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)


def test_doors_lead_somewhere() -> None:
    for module, imported in DOORS.items():
        assert imported in imports(module)


def test_planning_needs_no_torch() -> None:
    """Integers only: a plan is tested by the thousand, and read without a device."""
    for module in MODULES:
        if room_of(module) == "core.plan":
            assert not [name for name in imports(module) if name.partition(".")[0] == "torch"]


@pytest.mark.parametrize("upper", ["tools", "simulator"])
def test_the_library_knows_neither_tools_nor_simulator(upper: str) -> None:
    for module in MODULES:
        if room_of(module) in ("tools", "simulator", "__main__") or module in DOORS:
            continue
        used = [name for name in imports(module) if name.startswith(f"{PACKAGE}.{upper}")]
        assert not used, f"{module} imports {used}"


def test_kernels_find_each_other_by_name_only() -> None:
    """An adapter that needs another asks the registry: it can then be read, and removed, alone."""
    adapters = {type(offer_of(name)).__module__ for name in KERNELS}
    assert len(adapters) > 3
    for module in adapters:
        others = (adapters - {module}) & set(imports(module))
        assert not others, f"{module} imports {others}"
