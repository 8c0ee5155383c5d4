"""README and docs name files and folders of this repository that exist."""

import re
from pathlib import Path

import pytest

from tests.test_adding_a_variant import FILE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"(?<![\w./-])((?:\.\./)?(?:\w[\w.-]*/)*[\w-]+\.py)\b|`((?:\w[\w-]*/)+)`")
OF_THE_READER = {"README.md": {"my_attention.py"}}
PLACES = ("nnscaler_ring", "tests", "docs", "benchmarks", "examples")
FILES = [path for place in PLACES for path in (ROOT / place).rglob("*")]


def exists(named: str, page: Path) -> bool:
    """As a path from the root, the package or the page; a name without a folder, anywhere."""
    if any((base / named).exists() for base in (ROOT, ROOT / "nnscaler_ring", page.parent)):
        return True
    return "/" not in named and any(path.name == named for path in FILES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    new = {path for path, _ in FILE.findall(text)} | OF_THE_READER.get(page.name, set())
    named = {file or folder for file, folder in NAMED.findall(text)}
    missing = sorted(name for name in named - new if not exists(name, page))
    assert not missing, f"{page.name} names {missing}"
