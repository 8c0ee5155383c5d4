"""Messages in the one order that NCCL needs: no tags, and a post starts when the last is done."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from nnscaler_ring.core.exchange import EXCHANGES, Cut, Performance, Program
from nnscaler_ring.core.exchange.rounds import rounds_of
from nnscaler_ring.core.plan.schedule import Schedule
from nnscaler_ring.core.ranks import transport
from nnscaler_ring.core.ranks.groups import Place
from nnscaler_ring.core.ranks.transport import Kind, Message, Transfer
from tests.core.plan.test_schedule import packed_problem, random_problems


@dataclass(frozen=True)
class Post:
    """What one rank posts together: (peer, kind, elements) of every message, in order."""

    sends: list[tuple[int, Kind, int]]
    receives: list[tuple[int, Kind, int]]

    def peers(self) -> set[int]:
        return {peer for peer, *_ in (*self.sends, *self.receives)}


@dataclass
class Recorder:
    """A transport that moves nothing and writes down what is posted."""

    place: Place
    in_order: bool = True
    posts: list[Post] = field(default_factory=list)

    def post(self, kind: Kind, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        post = Post(*([(b, kind, x.numel()) for b, x in m if x.numel()] for m in (sends, receives)))
        if post.sends or post.receives:
            self.posts.append(post)
        return Transfer((), ())


def posts_of(
    program: Program, schedule: Schedule, rank: int, backward: bool, in_order: bool = True
) -> list[Post]:
    recorder = Recorder(Place(None, tuple(range(schedule.world_size)), rank), in_order)
    exchange = Performance(program, recorder)  # type: ignore[arg-type]
    k = torch.zeros(1, schedule.k_lens[rank], 1, 1)
    for step in (exchange.gradient_steps if backward else exchange.steps)(k, k.clone()):
        if backward:
            for total in (step.dk, step.dv):  # type: ignore[union-attr]
                total.add_(slice(None), torch.zeros_like(step.k))
    return recorder.posts


def assert_nccl_gets_through(ranks: Sequence[list[Post]]) -> None:
    """Play the posts: a rank's next post is done when each of its peers is at the post that meets
    it, and what is sent in order between two ranks is what is received."""
    streams = [iter(posts) for posts in ranks]
    current = [next(stream, None) for stream in streams]
    while any(current):
        done = {
            rank
            for rank, post in enumerate(current)
            if post and all(_meets(rank, peer, current) for peer in post.peers())
        }
        # Only whole sets of ranks that wait for nobody else: the peers of a done one are done.
        while (lost := {r for r in done if not current[r].peers() <= done}) != set():  # type: ignore[union-attr]
            done -= lost
        assert done, f"the ranks wait for each other: {current}"
        for rank in done:
            current[rank] = next(streams[rank], None)


def _meets(rank: int, peer: int, current: Sequence[Post | None]) -> bool:
    mine, theirs = current[rank], current[peer]
    assert mine is not None
    if theirs is None:
        return False
    return all(
        [m[1:] for m in a if m[0] == peer] == [m[1:] for m in b if m[0] == rank]
        for a, b in ((mine.sends, theirs.receives), (mine.receives, theirs.sends))
    )


def programs(name: str, schedule: Schedule) -> Callable[[int], Program]:
    return lambda rank: EXCHANGES[name].program(schedule, rank, Cut(4, 2))


def schedules() -> Iterator[tuple[str, Schedule]]:
    for problem in random_problems(31, 150, longest=9):
        yield problem.what, problem.schedule
    # Rank 0 skips the second of three rounds, the others do not.
    cu = (0, 1, 2, 6, 8)
    some = packed_problem("contiguous", "contiguous", (2,) * 4, (2,) * 4, cu, cu, True, (-1, -1))
    yield "a skipped round", some.schedule


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["direct", "ring"])
def test_every_exchange_posts_in_one_order(name, backward):
    skipped = 0
    for what, schedule in schedules():
        program = programs(name, schedule)
        ranks = range(schedule.world_size)
        try:
            assert_nccl_gets_through(
                [posts_of(program(rank), schedule, rank, backward) for rank in ranks]
            )
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        if name == "direct":
            skipped += sum(has_gap(rounds_of(schedule, rank, 2)[0]) for rank in ranks)
    assert name == "ring" or skipped > 20, skipped


def has_gap(rounds: Sequence[Any]) -> bool:
    numbers = [round_.number for round_ in rounds]
    return any(b > a + 1 for a, b in pairwise(numbers))


def test_the_player_finds_an_exchange_that_would_hang():
    """The check is worth something: posts in different orders, and a circle of lone sends."""
    one, other = (0, "gradient", 3), (0, "backward_kv", 3)
    a = [Post([(1, "gradient", 3)], []), Post([(1, "backward_kv", 3)], [])]
    b = [Post([], [other]), Post([], [one])]
    with pytest.raises(AssertionError, match="wait for each other"):
        assert_nccl_gets_through([a, b])
    assert_nccl_gets_through([a, b[::-1]])
    circle = [
        [Post([(right, "gradient", 3)], []), Post([], [(left, "gradient", 3)])]
        for left, right in ((2, 1), (0, 2), (1, 0))
    ]
    with pytest.raises(AssertionError, match="wait for each other"):
        assert_nccl_gets_through(circle)


def test_without_tags_the_order_is_needed():
    """Keys that are always posted before the computation would hang: see Transport.in_order."""
    hung = 0
    for _, schedule in schedules():
        program = programs("direct", schedule)
        ranks = range(schedule.world_size)
        posts = [posts_of(program(rank), schedule, rank, True, in_order=False) for rank in ranks]
        try:
            assert_nccl_gets_through(posts)
        except AssertionError:
            hung += 1
    assert hung > 0


@pytest.mark.parametrize(
    ("backends", "in_order"),
    [
        ({"cpu": "gloo", "cuda": "gloo"}, False),
        ({"cuda": "nccl"}, True),
        ({"cpu": "gloo", "cuda": "nccl"}, True),
    ],
    ids=str,
)
def test_only_gloo_has_tags(monkeypatch, backends, in_order):
    monkeypatch.setattr(transport, "backends_of", lambda group: backends)
    place = Place(object(), (0, 1), 0)  # type: ignore[arg-type]
    assert transport.Transport(place, None, "test", 0).in_order is in_order
    assert not transport.Transport(Place(None, (0, 1), 0), None, "test", 0).in_order
