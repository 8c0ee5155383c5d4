"""Two ranks whose default group is the two of them, as a Trainer wants it."""

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def pair() -> Iterator[RankPool]:
    ranks = RankPool(start_size=2, max_size=2)
    yield ranks
    ranks.close()
