"""The README's numbers are those of results/*.json."""

from pathlib import Path

from examples.energy_forecasting.summary import coverage_table, ranks_table, skill_table

README = Path(__file__).parents[2] / "examples" / "energy_forecasting" / "README.md"


def test_tables_are_those_of_the_results():
    text = README.read_text(encoding="utf-8")
    assert skill_table() in text and skill_table().count("US48") == 3
    assert coverage_table() in text and coverage_table().count("US48") == 3
    assert ranks_table() in text and ranks_table().count("MiB") == 3
