"""Sharded models give the unsharded model's logits, loss and gradients, for every architecture."""

import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers: the hf extra")

from tests.hf.architectures import ARCHITECTURES, PLAIN  # noqa: E402
from tests.hf.comparison import compare  # noqa: E402

TIMEOUT = 240  # seconds: a rank's first call imports transformers
LIMIT = 1e-10  # see FLOAT64_ABSOLUTE in tests/tolerances.py; what was seen is 1e-13 at most

CASES = [
    (name, case, layout)
    for name in ARCHITECTURES
    if name not in PLAIN
    for case, layout in (
        *(("dense", "zigzag"), ("dense", "contiguous")),
        *(("padded", "zigzag"), ("packed", "zigzag")),
    )
]

# One of each kind: full attention, windows with sinks, chunks, a value dim of its own.
FEW = [
    ("llama", "dense", "zigzag"),
    ("gpt_oss", "padded", "zigzag"),
    ("gpt_oss", "packed", "zigzag"),
    ("llama4", "packed", "zigzag"),
    ("deepseek_v3", "packed", "zigzag"),
    ("phi3_longrope", "dense", "contiguous"),
]


def check(pool, world_size, name, case, layout, **more):
    if not ARCHITECTURES[name].exists:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    for errors in pool.run(world_size, compare, name, case, layout, timeout=TIMEOUT, **more):
        assert all(error <= LIMIT for error in errors.values()), errors


@pytest.mark.parametrize(("name", "case", "layout"), FEW)
def test_equals_the_unsharded_model(pool, name, case, layout):
    check(pool, 3, name, case, layout)


def test_folded_documents(pool):
    check(pool, 3, "gpt_oss", "packed", "zigzag", packed_layout="folded")


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("name", "case", "layout"), CASES)
def test_every_architecture(pool, world_size, name, case, layout):
    check(pool, world_size, name, case, layout)


@pytest.mark.full
@pytest.mark.parametrize("case", ["dense", "packed"])
@pytest.mark.parametrize("name", [name for name in PLAIN if name in ARCHITECTURES])
def test_plain_architectures(pool, name, case):
    check(pool, 2, name, case, "zigzag")


def test_one_token_for_each_rank(pool):
    check(pool, 3, "llama", "dense", "zigzag", tokens=3)


@pytest.mark.parametrize("case", ["padded", "packed"])
def test_one_device(case):
    errors = compare(None, "gemma2", case, "zigzag")
    assert all(error <= LIMIT for error in errors.values()), errors


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_other_exchanges(pool, exchange):
    check(pool, 2, "mistral", "dense", "zigzag", exchange=exchange)
