"""torch's CUDA kernels on the meta device: its own operators' checks and shapes, nothing computed.

A value that is read on the host, which on a GPU means a wait, is an error there, and so is a tensor
that was made on the CPU.
"""

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.kernels import BackwardTensors, Problem, torch_cuda, torch_efficient
from nnscaler_ring.core.kernels.torch_cuda import TorchCuda
from nnscaler_ring.core.scores.dropout import Dropout
from nnscaler_ring.core.scores.scores import Scores
from tests.core.plan.test_schedule import dense_problem, packed_problem
from tests.core.test_engine import InOneProcess

META = torch.device("meta")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 40
LENS = (270, 270)
DOCUMENTS = (0, 300, 301, 301, 540)
SCHEDULES = {
    "zigzag": dense_problem("zigzag", "zigzag", LENS, True, (-1, -1)),
    "window": dense_problem("contiguous", "contiguous", LENS, True, (100, -1)),
    "packed": packed_problem(
        "contiguous", "contiguous", LENS, LENS, DOCUMENTS, DOCUMENTS, True, (-1, -1)
    ),
}


class Aten:
    """torch.ops.aten, and gradients like the inputs where torch's own meta function is broken."""

    def __getattr__(self, name):
        return getattr(torch.ops.aten, name)

    def _efficient_attention_backward(self, dout, q, k, v, *args, **options):
        return *(torch.empty_like(x) for x in (q, k, v)), None


@pytest.fixture(autouse=True)
def efficient(monkeypatch):
    monkeypatch.setattr(torch_efficient, "aten", Aten())
    torch_cuda._has_lse_column.cache_clear()
    yield
    torch_cuda._has_lse_column.cache_clear()


def mods_of(option: str | None, dtype: torch.dtype, rows: int, keys: int) -> dict[str, object]:
    match option:
        case "softcap":
            return {"softcap": 2.0}
        case "alibi":
            return {"alibi_slopes": torch.empty(1, HEADS, device=META)}
        case "bias":
            bias = torch.empty(1, HEADS, rows, keys, dtype=dtype, device=META)
            return {"bias": bias, "needs_dbias": True}
        case "dropout":
            return {"dropout": Dropout(0.3, torch.empty((), dtype=torch.int64, device=META), 0, 0)}
    return {}


def empty(rows: int, heads: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, rows, heads, HEAD_DIM, dtype=dtype, device=META)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize(
    ("dtype", "option"),
    [
        (torch.bfloat16, None),
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, "softcap"),
        (torch.bfloat16, "alibi"),
        (torch.bfloat16, "bias"),
        (torch.bfloat16, "dropout"),
    ],
    ids=str,
)
@pytest.mark.parametrize("lse_gradient", [False, True])
def test_nothing_is_read_on_the_host(name, dtype, option, lse_gradient):
    schedule, (rows, keys) = SCHEDULES[name], (LENS[1], sum(LENS))
    options = {} if option is None else {option: True}
    problem = Problem(
        *("cuda", dtype, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM),
        **options,
        compute_capability=(9, 0),
    )
    kernel = TorchCuda().prepared(problem)
    scores = Scores(0.3, schedule.schedule, 1, **mods_of(option, dtype, rows, keys))
    q, dout = empty(rows, HEADS, dtype), empty(rows, HEADS, dtype)
    ks, vs = ([empty(n, KV_HEADS, dtype) for n in LENS] for _ in range(2))
    exchange = InOneProcess(schedule, 1, ks, vs)
    options = {"exchange": exchange, "kernel": kernel, "scores": scores}
    out, lse = attention_forward(q, ks[1], vs[1], **options)
    dlse = torch.empty_like(lse) if lse_gradient else None
    tensors = BackwardTensors(dout, dlse, q, ks[1], vs[1], out, lse)
    gradients = attention_backward(tensors, **options)
    for x, like in ((out, q), (gradients.dq, q), (gradients.dk, ks[0]), (gradients.dv, vs[0])):
        assert x.device == META and x.dtype == dtype and x.shape == like.shape
    assert lse.device == META and lse.shape == (1, HEADS, rows)
    assert (gradients.dbias is None) == (option != "bias")
