"""Ranks for nnScaler, and what happens where it is not installed."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import RankPool

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where nnScaler is missing, unless NNSCALER_REQUIRED says that it must be there."""
    if os.environ.get("NNSCALER_REQUIRED") or importlib.util.find_spec("nnscaler"):
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs nnScaler, which is not installed"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """A world of exactly 2 ranks: nnScaler's runtime is always the whole world."""
    ranks = RankPool(start_size=2, max_size=2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """A world of exactly 4 ranks."""
    ranks = RankPool(start_size=4, max_size=4)
    yield ranks
    ranks.close()
