"""What the policies say of a model that they cannot split, or not all of."""

import logging
from functools import partial
from typing import Any

import torch

from nnscaler_ring import policies
from tests.nnscaler.models import Gathering
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.ranks import RankPool


def report(ranks: list[int], dim: int) -> tuple[list[str], str]:
    """What our policy logs while it plans, and the error that it ends in."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("nnscaler_ring").addHandler(listener)
    policy = partial(policies.shard_sequence, dim=dim)
    dummy: dict[str, Any] = {"x": torch.randn(2, 12, 4, 8)}
    error = ""
    try:
        with nnscaler_ranks() as nnscaler:
            parallelize(nnscaler, Gathering(), dummy, policy, len(ranks))
    except RuntimeError as failure:
        error = str(failure.__cause__)
    finally:
        logging.getLogger("nnscaler_ring").removeHandler(listener)
    return told, error


def test_what_gathers_is_told_once(two_ranks: RankPool) -> None:
    """With its line in the model, on the rank that plans."""
    (told, error), (others, _) = two_ranks.run(2, report, 1, timeout=60)
    assert not error and not others
    (message,) = told
    assert "2 op(s) cannot be split along the sequence" in message
    assert "and for 1 of 2 call(s) of attention" in message
    (line,) = [line for line in message.splitlines() if "torch.log_softmax in" in line]
    assert "models.py" in line and "y = torch.log_softmax(x, dim=-1)" in line
    assert line.endswith("(2 times)")


def test_nothing_to_split_is_refused(two_ranks: RankPool) -> None:
    """Instead of a plan in which every rank computes everything."""
    message = "must find something to split, got a model that takes no tensor with tokens in dim"
    assert message in two_ranks.run(2, report, 9, timeout=60)[0][1]
