"""On the ranks of a group: generate() over a sharded cache, beside the unsharded model."""

from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from nnscaler_ring import set_agreement_timeout
from nnscaler_ring.hf import RingCache, apply_ring_attention
from tests.hf import dense_attention
from tests.hf.architectures import ARCHITECTURES, VOCABULARY

PROMPT, NEW = 29, 12  # tokens
CACHE = "cache" if int(transformers.__version__.split(".")[0]) >= 5 else "past_key_values"


def prompts() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (2, PROMPT), generator=generator)


def generated(model: Any, sampled: bool, **more: Any) -> Tensor:
    """Tokens of the two prompts and of what follows; never cut short."""
    model.generation_config.eos_token_id = None
    ids = prompts()
    torch.manual_seed(11)
    how: dict[str, Any] = {"do_sample": True, "temperature": 0.8} if sampled else {}
    how = {"do_sample": False, "max_new_tokens": NEW, **how}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how, **more)


def compare(
    ranks: list[int], name: str, sampled: bool, prefill: bool
) -> tuple[bool, list[int], int]:
    """Whether the tokens are the unsharded model's; keys that every layer holds; all keys."""
    dense_attention.register()
    set_agreement_timeout(dist.group.WORLD, 25.0)
    whole = ARCHITECTURES[name].build(dense_attention.NAME).eval()
    expected = generated(whole, sampled)
    model = ARCHITECTURES[name].build("eager").eval()
    apply_ring_attention(model, ranks)
    cache = RingCache(model)
    if prefill:
        cache.prefill(model, prompts())
        assert cache.get_seq_length() == PROMPT - 1
    found = generated(model, sampled, **{CACHE: cache})
    held = [layer.keys.shape[-2] for layer in cache.layers]
    return torch.equal(found, expected), held, cache.get_seq_length()
