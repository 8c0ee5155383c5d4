"""Fixtures and marks that all tests share."""

import importlib.metadata
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.cases import start_on
from tests.ranks import START_SECONDS, RankPool

# The same examples in every run: a red build must mean a change of the code.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


# The ranks of a test use all cores; more threads here only get in their way.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    try:
        nnscaler = importlib.metadata.version("nnscaler")
    except importlib.metadata.PackageNotFoundError:
        nnscaler = "not installed"
    threads = f"{torch.get_num_threads()} threads here and 1 per rank on {os.cpu_count()} CPUs"
    return f"torch {torch.__version__}, nnscaler {nnscaler}, {threads}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors are: a test that takes it runs on the CPU and, marked cuda, on a GPU.

    All ranks of the pool then share one GPU, over gloo.
    """
    name: str = request.param
    if name == "cuda" and "pool" in request.fixturenames:
        pool: RankPool = request.getfixturevalue("pool")
        pool.run(pool.size, start_on, name, timeout=START_SECONDS)
    return name


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the session; see RankPool.run."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks(pool: RankPool) -> RankPool:
    """A pool of four fresh ranks, for meshes.

    torch makes the groups of a mesh with the whole world and numbers them by how many a rank has
    made before, which in a used pool differs from rank to rank.
    """
    pool.close()
    pool.size = 4
    return pool
