"""What ranks that do not agree are told."""

from nnscaler_ring.core.ranks.difference import contrast


def test_short_values_are_shown_whole_and_long_ones_by_their_first_difference():
    assert contrast("[1, 2]", "[1, 3]") == ("[1, 2]", "[1, 3]")
    assert contrast("x" * 300, "[1]") == ("x" * 300, "[1]")
    long = list(range(100))
    assert contrast(str(long), str([*long[:70], 0, *long[71:]])) == (
        "100 entries with 70 at index 70",
        "100 entries with 0 at index 70",
    )
    assert contrast(str(long), str(long[:99])) == (
        "100 entries with 99 at index 99",
        "99 entries with nothing at index 99",
    )
