"""docs/support.md says what the kernels say."""

import runpy
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "support.md"


def test_the_table_of_kernels_is_up_to_date():
    write_support = runpy.run_path(str(PAGE.with_name("write_support.py")))
    text = PAGE.read_text(encoding="utf-8")
    assert write_support["page"](text) == text, "run python docs/write_support.py"
