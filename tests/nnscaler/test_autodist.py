"""The autodist policy: a constraint file pins the sequence, and the profiler gets real inputs."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nnscaler_ring import policies
from tests.nnscaler.models import CONFIG, TOKENS, OneCall, arguments, transformer
from tests.nnscaler.plans import DENSE_DIMS, PACKED_DIMS
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import make_qkv
from tests.ranks import RankPool

PIN = """
- name: nnscaler_ring.ring_attn.wrap_ring_attn_func
  parent_module: ''
  allowed_partition_dims: ['0,1']
  replica_allowed: false
"""


def plan_by_autodist(
    ranks: list[int], policy: Any, constraints: str = ""
) -> tuple[float, float, str]:
    """The losses of autodist's plan and of one device, and the generated code."""
    torch.manual_seed(0)
    model = transformer()
    ids = torch.randint(0, CONFIG.num_bytes, (2, TOKENS))
    folder = Path(tempfile.mkdtemp())
    config = {"mem_constraint": 8, "profile_dir": str(folder)}  # GB
    if constraints:
        (folder / "constraints.yaml").write_text(constraints)
        config |= {"partition_constraints_path": str(folder / "constraints.yaml")}
    with nnscaler_ranks() as nnscaler:
        parallel, code = parallelize(
            nnscaler,
            model,
            arguments(ids, ids),
            policy,
            len(ranks),
            pas_config=config,
        )
        inputs = arguments(ids, ids)
        return parallel(**inputs).item(), model(**inputs).item(), code


@pytest.mark.full
@pytest.mark.parametrize("pin", ["constraint file", "policy"])
def test_constraint_pins_the_sequence(two_ranks: RankPool, pin: str) -> None:
    """By a constraint in the user's file, and by the policy that writes it."""
    how = ("autodist", PIN) if pin == "constraint file" else (policies.autodist_by_sequence,)
    for loss, expected, code in two_ranks.run(2, plan_by_autodist, *how, timeout=200):
        assert loss == pytest.approx(expected, rel=1e-5)
        groups = re.findall(r"process_group=(.*)\)$", code, re.MULTILINE)
        assert groups == ["(0, 1)"] * CONFIG.num_layers


KEEP_WHOLE = """
- name: nnscaler_ring.ring_attn.wrap_ring_attn_func
  parent_module: ''
  allowed_partition_dims: []
  replica_allowed: true
- name: torch.nn.functional.linear
  parent_module: ''
  allowed_partition_dims: []
  replica_allowed: true
"""


def plan_one_call(ranks: list[int], constraints: str) -> str:
    """The code of autodist by sequence for one call, with a user's constraints."""
    q, k, v = make_qkv(0, 2, 12, 12, 4, 2, 8, None, torch.float32)
    folder = Path(tempfile.mkdtemp())
    (folder / "constraints.yaml").write_text(constraints)
    config = {
        "mem_constraint": 8,
        "profile_dir": str(folder),
        "partition_constraints_path": str(folder / "constraints.yaml"),
    }
    with nnscaler_ranks() as nnscaler:
        _, code = parallelize(
            nnscaler,
            OneCall("ring", {}),
            {"q": q, "k": k, "v": v},
            policies.autodist_by_sequence,
            len(ranks),
            pas_config=config,
        )
    return code


def test_autodist_by_sequence(two_ranks: RankPool) -> None:
    """With nnScaler's own defaults, and though the user's file asks for the opposite."""
    for code in two_ranks.run(2, plan_one_call, KEEP_WHOLE, timeout=60):
        assert re.findall(r"process_group=(.*)\)$", code, re.MULTILINE) == ["(0, 1)"]


def sampled(ranks: list[int], op: str, dim: str) -> list[tuple[list, float]]:
    """Per input of a sub-call, split along `dim`: its sample's shape and largest value."""
    tokens = 12
    q, k, v = make_qkv(0, None if op == "varlen" else 2, tokens, tokens, 4, 2, 8)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    found: list = []

    def policy(graph, _):
        (node,) = graph.select(ntype=IRFwOperation)
        idx = (PACKED_DIMS if op == "varlen" else DENSE_DIMS)[dim]
        parts = graph.partition(node, node.algorithm("dim"), idx=0, dim=idx, num=2)
        sample = CustomizedOps.kOpInputGen[node.signature]
        inputs = sample(parts[1])
        found.extend((list(x.shape), x.max().item()) for x in inputs)
        CustomizedOps.kOpRuntime[node.signature](*inputs, causal=True)
        for device, part in enumerate(parts):
            graph.assign(part, device)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.graph.parser.register import CustomizedOps
        from nnscaler.ir.operator import IRFwOperation

        dummy = {"q": q, "k": k, "v": v}
        if op == "varlen":
            dummy |= {"cu_q": bounds, "cu_k": bounds}
        parallelize(nnscaler, OneCall(op, {"causal": True}), dummy, policy, 2)
    return found


def test_packed_samples_have_all_keys(two_ranks: RankPool) -> None:
    """The profiler's own samples have cu_seqlens of zeros: attention to nothing."""
    (q, _), (k, _), (v, _), (cu_q, q_end), (cu_k, k_end) = two_ranks.run(
        2, sampled, "varlen", "sequence"
    )[0]
    assert (q, k, v) == ([6, 4, 8], [12, 2, 8], [12, 2, 8])
    assert (cu_q, cu_k, q_end, k_end) == ([3], [3], 6, 12)
    (q, _), (k, _), *_ = two_ranks.run(2, sampled, "varlen", "heads")[0]
    assert (q, k) == ([12, 2, 8], [12, 1, 8])


@pytest.mark.parametrize("op", ["ring", "zigzag"])
def test_dense_samples_have_the_local_shapes(two_ranks: RankPool, op: str) -> None:
    (q, _), (k, _), (v, _) = two_ranks.run(2, sampled, op, "sequence")[0]
    assert (q, k, v) == ([2, 6, 4, 8], [2, 6, 2, 8], [2, 6, 2, 8])
