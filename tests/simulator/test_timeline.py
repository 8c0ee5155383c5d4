"""Time as events: what is computed, moved and waited for, on machines made up for the purpose."""

from dataclasses import replace
from itertools import pairwise

import pytest

from nnscaler_ring.core.exchange.program import Post
from nnscaler_ring.core.plan.schedule import CAUSAL, FULL, Mask
from nnscaler_ring.simulator import SimulatedCall, Sizes
from nnscaler_ring.simulator.cluster import Cluster, Link, Rates, load_cluster
from nnscaler_ring.simulator.memory import KernelTraits
from nnscaler_ring.simulator.timeline import Timeline, simulate_timeline

SIZES = Sizes(4, 2, 16, 16)
ENDLESS = 1e30
TOY = Cluster(
    name="toy",
    source="made up for tests",
    device_type="cuda",
    memory_bytes=1e9,
    memory_bytes_per_second=ENDLESS,
    devices_per_node=8,
    inside=Link(1e9, 0.0),
    between=Link(1e8, 0.0),
    overlap=1.0,
    rates={"float32": Rates(1e9, 1e9, 0.0, 0.0)},
)


def timeline(
    cluster: Cluster = TOY,
    *,
    ranks: int = 4,
    tokens: int = 1024,
    layout: str = "zigzag",
    mask: Mask = CAUSAL,
    exchange: str = "direct",
    backward: bool = False,
) -> Timeline:
    call = SimulatedCall(tokens, ranks, SIZES, mask, layout, exchange=exchange)
    return simulate_timeline(call, cluster, KernelTraits(), backward=backward)


@pytest.mark.parametrize("exchange", ["direct", "ring", "all_gather"])
@pytest.mark.parametrize("backward", [False, True])
def test_computing_takes_the_flops_of_the_mask(exchange: str, backward: bool) -> None:
    """No link costs anything: every rank is busy for its tiles' FLOPs, and never waits."""
    free = replace(TOY, inside=Link(ENDLESS, 0.0))
    found = timeline(free, exchange=exchange, backward=backward)
    pairs = 1024 * 1025 // 2
    flops = SIZES.flops(pairs, backward=backward)
    assert sum(rank.seconds("compute") for rank in found.ranks) == pytest.approx(flops / 1e9)
    assert found.seconds == pytest.approx(flops / 1e9 / 4, rel=0.02)


def test_contiguous_causal_waits_for_its_last_rank() -> None:
    zigzag, contiguous = (timeline(layout=layout) for layout in ("zigzag", "contiguous"))
    assert contiguous.seconds > 1.6 * zigzag.seconds


def test_transfers_hide_under_computing_and_gathering_does_not() -> None:
    direct, ring, gathered = (
        timeline(mask=FULL, exchange=exchange) for exchange in ("direct", "ring", "all_gather")
    )
    assert direct.overlap == ring.overlap == 1.0
    assert gathered.overlap == 0.0
    assert gathered.seconds > direct.seconds


def test_a_slow_link_is_waited_for() -> None:
    """Then a rank's time is that of its messages, and the link's latency counts each."""
    slow = replace(TOY, inside=Link(1e5, 0.0))
    found = timeline(slow, mask=FULL)
    call = SimulatedCall(1024, 4, SIZES, FULL, "zigzag")
    sent = (
        sum(
            receive.length
            for action in call.program(0).forward
            if isinstance(action, Post)
            for receive in action.receives
        )
        * SIZES.kv_numbers
        * 4
    )
    last_step = SIZES.flops(256 * 256, backward=False) / 1e9
    assert found.seconds == pytest.approx(sent / 1e5 + last_step, rel=1e-6)
    later = timeline(replace(slow, inside=Link(1e5, 0.5)), mask=FULL)
    assert later.seconds == pytest.approx(found.seconds + 3 * 0.5)


def test_links_between_nodes_are_slower() -> None:
    nodes = replace(TOY, devices_per_node=2, inside=Link(1e7, 0.0), between=Link(1e5, 0.0))
    assert timeline(nodes).seconds > timeline(replace(nodes, devices_per_node=4)).seconds


def test_without_overlap_moving_takes_the_ranks_time() -> None:
    beside, instead = (
        timeline(replace(TOY, inside=Link(1e7, 0.0), overlap=overlap)) for overlap in (1.0, 0.0)
    )
    assert instead.seconds > beside.seconds


@pytest.mark.parametrize("exchange", ["direct", "ring"])
def test_events_of_a_rank_follow_each_other(exchange: str) -> None:
    for rank in timeline(load_cluster("h200"), exchange=exchange, backward=True).ranks:
        own = [event for event in rank.events if event.kind != "transfer"]
        for before, after in pairwise(own):
            assert before.end == pytest.approx(after.start)
        assert own[-1].end == rank.now
