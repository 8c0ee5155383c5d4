"""nnScaler's own profiler times every op, every part and every option, and never falls back."""

import json
import logging
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nnscaler_ring.nnscaler_ops import FAILED_MILLISECONDS, OPS, tensor_names
from tests.nnscaler.compat_models import PackedCall
from tests.nnscaler.models import DilatedCall, OneCall
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.nnscaler.test_compat import shuffled
from tests.oracle import make_qkv
from tests.ranks import RankPool

BATCH, TOKENS = 2, 12
BOUNDS = torch.tensor([0, 1, 4, 12], dtype=torch.int32)  # three documents


@dataclass(frozen=True)
class Call:
    """One call: its options, and its optional tensors by name and shape."""

    op: str
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def model(self) -> torch.nn.Module:
        kinds = {"dilated": DilatedCall, "sliding": partial(PackedCall, "sliding")}
        return kinds.get(self.op, partial(OneCall, self.op))(self.options)

    @property
    def packed(self) -> bool:
        return self.op in ("varlen", "sliding")

    def inputs(self) -> dict[str, Any]:
        batch = None if self.packed else BATCH
        q, k, v = make_qkv(0, batch, TOKENS, TOKENS, 4, 2, 8, None, self.dtype)
        found: dict[str, Any] = {"q": q, "k": k, "v": v}
        if self.packed:
            found |= {"cu_q": BOUNDS, "cu_k": BOUNDS}
        if self.op == "sliding":
            return found | {"slopes": None}
        return found | {name: torch.zeros(shape) for name, shape in self.tensors.items()}

    def dims(self) -> dict[str, int]:
        dense = {"batch": 0, "sequence": 1, "heads": 2}
        return {"sequence": 0, "heads": 1} if self.packed else dense


OPTIONS = {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 5, "return_lse": True}
BIAS = {"bias": (BATCH, 4, TOKENS, TOKENS)}
CALLS = (
    Call("ring"),
    Call("ring", {"causal": False, "window_size": (3, 2), "exchange": "ring"}),
    Call("ring", OPTIONS, {"slopes": (4,), "sinks": (4,), **BIAS}),
    Call("ring", {}, {"slopes": (BATCH, 4)}, torch.bfloat16),
    Call("zigzag", {"softmax_scale": 0.5, "exchange": "all_gather"}),
    Call("zigzag", OPTIONS, {"sinks": (4,), "bias": (1, 1, TOKENS, TOKENS)}),
    Call("varlen", {"causal": True}),
    Call("varlen", OPTIONS, {"slopes": (4,), "bias": (4, TOKENS, TOKENS), "sinks": (4,)}),
    Call("dilated", {"head_offsets": "block"}),
    Call("sliding", {"window_size": (4, 0), "return_lse": True}),
)


def profile_parts(ranks: list[int], calls: list[Call]) -> list[tuple[str, float, float]]:
    """What was profiled, milliseconds forward and backward: each call and each way to split it."""
    logging.disable(logging.CRITICAL)
    found: list[tuple[str, float, float]] = []

    def policy(graph: Any, cfg: Any) -> Any:
        (node,) = graph.select(ntype=IRFwOperation)
        parts = {"whole": node}
        for kind, dim in call.dims().items():
            options = {"idx": 0, "dim": dim, "num": 2}
            parts[kind] = node.algorithm("dim").instantiate(**options)[1]
        for kind, part in parts.items():
            times = database.ProfileDataBase().profile(part)
            found.append((f"{call}, {kind}", times.fw_span, times.bw_span))
        for device, replica in enumerate(graph.replicate(node, len(ranks))):
            graph.assign(replica, device)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.ir.operator import IRFwOperation
        from nnscaler.profiler import database

        whole_profile = database.profile
        database.profile = partial(whole_profile, prof_times=2)  # 20 tell no more than 2 here
        for call in calls:
            parallelize(nnscaler, call.model(), call.inputs(), policy, len(ranks))
        database.profile = whole_profile
    logging.disable(logging.NOTSET)
    return found


def test_every_op_is_timed(two_ranks: RankPool) -> None:
    found = two_ranks.run(2, profile_parts, list(CALLS), timeout=200)[0]
    assert len(found) == sum(1 + len(call.dims()) for call in CALLS)
    for what, forward, backward in found:
        assert 0 < forward < FAILED_MILLISECONDS, what
        assert backward < 2 * FAILED_MILLISECONDS, what


def profile_shuffled(ranks: list[int]) -> list[tuple[str, float]]:
    """The ops under nnScaler's own names: each call, and its part by tokens."""
    logging.disable(logging.CRITICAL)
    found = []

    def policy(graph: Any, cfg: Any) -> Any:
        for node in graph.select(ntype=IRFwOperation):
            if node.signature.startswith("nnscaler_ring."):
                part = node.algorithm("dim").instantiate(idx=0, dim=0, num=2)[1]
                for x in (node, part):
                    found.append((node.name, database.ProfileDataBase().profile(x).fw_span))
            for device, replica in enumerate(graph.replicate(node, len(ranks))):
                graph.assign(replica, device)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.ir.operator import IRFwOperation
        from nnscaler.profiler import database

        model, inputs = shuffled()
        parallelize(nnscaler, model, inputs, policy, len(ranks))
    logging.disable(logging.NOTSET)
    return found


def test_ops_under_their_names_are_timed(two_ranks: RankPool) -> None:
    found = two_ranks.run(2, profile_shuffled, timeout=100)[0]
    assert len(found) == 10
    for name, forward in found:
        assert 0 < forward < FAILED_MILLISECONDS, name


def count_keys(ranks: list[int], calls: list[Call]) -> list[dict[str, Any]]:
    """For the last part of each call by sequence: how many keys each query of its sample sees."""
    found: list[dict[str, Any]] = []

    def policy(graph: Any, cfg: Any) -> Any:
        (node,) = graph.select(ntype=IRFwOperation)
        dim = call.dims()["sequence"]
        part = node.algorithm("dim").instantiate(idx=0, dim=dim, num=2)[1]
        q, k, v, *bounds = CustomizedOps.kOpInputGen[part.signature](part)
        with torch.no_grad():  # no score tells keys apart: the denominator counts them
            k.zero_()
            for x in getattr(q, "extras", {}).values():
                x.zero_()
        function, *_, keywords = get_func(part)
        out, lse = function(q.clone(), k, v, *bounds, **{**keywords, "return_lse": True})
        out.sum().backward()
        keys = lse.exp().round().int().flatten(0, -2)
        found.append({"names": tensor_names(part), "keys": keys.tolist()})
        for device, replica in enumerate(graph.replicate(node, len(ranks))):
            graph.assign(replica, device)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.graph.parser.register import CustomizedOps
        from nnscaler.ir.operator import IRFwOperation
        from nnscaler.profiler.database import get_func

        for call in calls:
            parallelize(nnscaler, call.model(), call.inputs(), policy, len(ranks))
    return found


def test_a_part_reads_what_its_rank_reads(two_ranks: RankPool) -> None:
    """The queries of the last block, by the keys that they see."""
    bias = {"bias": (BATCH, 4, TOKENS, TOKENS)}
    calls = [
        (Call("ring"), range(7, 13)),
        (Call("ring", {}, bias), range(7, 13)),
        (Call("ring", {"causal": False}), [12] * 6),
        (Call("ring", {"window_size": (2, 0)}), [3] * 6),
        (Call("ring", {"mask": "Chunks(4)"}), [3, 4, 1, 2, 3, 4]),
        # Of 12 tokens in two halves a rank computes two quarters: as many pairs as 9 keys give.
        (Call("zigzag"), range(4, 10)),
        # Three documents of four: the block from 6 on holds the end of one and the last.
        (Call("varlen", {"causal": True}), [3, 4, 1, 2, 3, 4]),
        (Call("varlen", {}, {"slopes": (4,)}), [4] * 6),
    ]
    results = two_ranks.run(2, count_keys, [call for call, _ in calls], timeout=100)[0]
    for (call, expected), found in zip(calls, results, strict=True):
        assert all(keys == list(expected) for keys in found["keys"]), call
        optional = [{"slopes": "alibi_slopes"}.get(name, name) for name in call.tensors]
        assert list(found["names"][5 if call.packed else 3 :]) == optional


def plan_with_cache(ranks: list[int], folder: Path) -> list[str]:
    """The warnings of autodist with this profile cache."""
    call = Call("ring")
    with nnscaler_ranks() as nnscaler, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = {"mem_constraint": 8, "profile_dir": str(folder)}
        parallelize(
            nnscaler, call.model(), call.inputs(), "autodist", len(ranks), pas_config=config
        )
    return [str(warning.message) for warning in caught]


def test_failed_times_in_the_cache_are_told(two_ranks: RankPool, tmp_path: Path) -> None:
    """Up to 0.1 every op failed in nnScaler's profiler, and its cache still says so."""
    assert not any("profile cache" in x for x in two_ranks.run(2, plan_with_cache, tmp_path)[0])
    cache = tmp_path / "comp" / f"{OPS[0].signature}.json"
    times = json.loads(cache.read_text())
    assert len(times) == 4  # whole, by batch, by sequence, by heads
    assert all(x["fw_span"] < FAILED_MILLISECONDS for x in times.values())
    for x in times.values():
        x["fw_span"] = FAILED_MILLISECONDS
    cache.write_text(json.dumps(times))
    told = [x for x in two_ranks.run(2, plan_with_cache, tmp_path)[0] if "profile cache" in x]
    assert told and str(cache) in told[0] and "re_profile" in told[0]
