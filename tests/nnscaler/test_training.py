"""A transformer whose sequence nnScaler shards trains like on one device, to the last digits."""

import re
from functools import cache

import pytest
import torch

from tests.nnscaler.models import CONFIG, TOKENS
from tests.nnscaler.training import BATCH, Record, Training, train, train_on_one_device
from tests.ranks import RankPool

TRAININGS = {
    "sequence on 2": (2, Training()),
    "zigzag, ZeRO-1": (2, Training(op="zigzag", use_zero=1)),
    "clipping": (2, Training(max_norm=10.0)),
    "resumed": (2, Training(steps=4, resume_after=2)),
    "resumed, ZeRO-1": (4, Training(plan_ngpus=2, steps=4, resume_after=2, use_zero=1)),
    "sequence on 4": (4, Training(plan_ngpus=4)),
    "sequence on 2 of 4": (4, Training(plan_ngpus=2)),
    "2 of 4, ZeRO-1, clipping": (4, Training(plan_ngpus=2, use_zero=1, max_norm=10.0)),
    "and heads": (4, Training("sequence and heads", plan_ngpus=4)),
    "and heads, zigzag, ZeRO-1": (
        4,
        Training("sequence and heads", plan_ngpus=4, op="zigzag", use_zero=1),
    ),
    "and batch": (4, Training("sequence and batch", plan_ngpus=4)),
    "and batch, zigzag, clipping": (
        4,
        Training("sequence and batch", plan_ngpus=4, op="zigzag", max_norm=10.0),
    ),
}
LINEARS = 7 * CONFIG.num_layers + 1
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@cache
def expected(op: str, max_norm: float | None, steps: int) -> Record:
    return train_on_one_device(Training(op=op, max_norm=max_norm, steps=steps))


LONG = ("sequence on 2 of 4", "2 of 4, ZeRO-1, clipping", "and heads", "and batch")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name in LONG)) for name in TRAININGS],
)
def test_trains_like_one_device(two_ranks: RankPool, four_ranks: RankPool, name: str) -> None:
    world_size, training = TRAININGS[name]
    pool = two_ranks if world_size == 2 else four_ranks
    records = pool.run(world_size, train, training, timeout=120)
    one = expected(training.op, training.max_norm, training.steps)
    tolerance = TOLERANCE[training.dtype]
    for record in records:
        assert record.losses == pytest.approx(one.losses, rel=tolerance)
        assert record.norms == pytest.approx(one.norms, rel=tolerance)
        if not training.use_zero:
            assert set(record.gradients) == set(one.gradients)
        for found, reference in ((record.gradients, one.gradients), (record.weights, one.weights)):
            for parameter, x in found.items():
                torch.testing.assert_close(
                    x.reshape(reference[parameter].shape),
                    reference[parameter],
                    rtol=0,
                    atol=tolerance,
                    msg=lambda text, parameter=parameter: f"{parameter}: {text}",
                )
        assert set(record.weights) == set(one.weights)
    assert training.max_norm is None or min(one.norms) > 2 * training.max_norm, "it must cut"
    for record in records:
        check_shares(record, world_size, training.steps)


def check_shares(record: Record, world_size: int, steps: int) -> None:
    """Each linear saw tokens / N, and no activation was gathered: nothing is replicated."""
    ((batch, tokens),) = record.linear_tokens
    assert batch * tokens == BATCH * TOKENS // world_size
    assert record.linears == LINEARS * steps
    assert "gather" not in record.code.split("def reducer")[0].split("def segment")[1]
    groups = re.findall(r"process_group=(.*)\)$", record.code, re.MULTILINE)
    assert len(groups) == CONFIG.num_layers and len(set(groups)) == 1 and "None" not in groups
