"""generate() over a sharded cache gives the unsharded model's tokens."""

import pytest

pytest.importorskip("transformers", reason="needs transformers: the hf extra")

import torch

from nnscaler_ring.hf import RingCache
from tests.hf import generation
from tests.hf.architectures import ARCHITECTURES, OLD
from tests.hf.test_wrong_use import prepared

TIMEOUT = 240  # seconds

FEW = [("gpt_oss", False, True), ("llama", True, True), ("deepseek_v3", False, False)]
ALL = [
    *(
        (name, sampled, True)
        for name in ("llama", "gpt_oss", "gemma2", "mistral", "deepseek_v3")
        for sampled in (False, True)
    ),
    *(("llama4", False, True), ("phi3_longrope", False, True), ("gemma3", False, False)),
]


def check(pool, world_size, name, sampled, prefill):
    if OLD and name == "deepseek_v3":
        pytest.skip("transformers 4 cannot run it in float64")
    if not ARCHITECTURES[name].exists:
        pytest.skip(f"this transformers has no {name}")
    for same, held, total in pool.run(
        world_size, generation.compare, name, sampled, prefill, timeout=TIMEOUT
    ):
        assert same
        assert total == generation.PROMPT + generation.NEW - 1
        # A rank's share, rounded up once for the prompt and once for what was generated.
        assert max(held) <= -(-total // world_size) + 2


@pytest.mark.parametrize(("name", "sampled", "prefill"), FEW)
def test_tokens_of_the_unsharded_model(pool, name, sampled, prefill):
    check(pool, 3, name, sampled, prefill)


@pytest.mark.full
@pytest.mark.parametrize(("name", "sampled", "prefill"), ALL)
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_tokens(pool, world_size, name, sampled, prefill):
    check(pool, world_size, name, sampled, prefill)


def test_without_a_ring_cache():
    model = prepared().eval()
    with pytest.raises(ValueError, match=r"To generate, pass cache=RingCache\(model\)"):
        model.generate(generation.prompts(), max_new_tokens=2)


def test_a_cache_that_is_not_empty():
    model = prepared().eval()
    cache = RingCache(model)
    cache.prefill(model, generation.prompts())
    with pytest.raises(ValueError, match="the cache must be empty, got 28 tokens"):
        cache.prefill(model, generation.prompts())
    with pytest.raises(NotImplementedError, match="RingCache cannot give tokens back"):
        cache.crop(-1)


def test_left_padding():
    model = prepared().eval()
    mask = torch.ones_like(generation.prompts())
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="Left padding cannot be expressed"):
        model.generate(
            generation.prompts(),
            attention_mask=mask,
            max_new_tokens=2,
            **{generation.CACHE: RingCache(model)},
        )
