"""Programs of all ranks, played against each other: what holds for every exchange, by counting."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnscaler_ring.core.exchange import EXCHANGES, Cut, Exchange, Program
from nnscaler_ring.core.exchange.program import Add, Compute, Free, Post, performed, rows_at_once
from tests.core.plan.test_schedule import Problem, dense_problem, random_problems
from tests.core.program_player import Play, sent_in
from tests.core.toy_exchange import TOY

ALL = {**EXCHANGES, "toy": TOY}


def problems() -> Iterator[Problem]:
    yield from random_problems(51, 60, longest=9)
    rng = random.Random(52)
    for layout in ("contiguous", "zigzag", "striped"):
        for _ in range(3):
            lens = [rng.choice((0, 1, rng.randint(2, 11))) for _ in range(6)]
            yield dense_problem(
                layout, layout, lens, rng.random() < 0.6, rng.choice(((-1, -1), (4, 3)))
            )


def programs_of(exchange: Exchange, problem: Problem, keys: int = 2) -> list[Program]:
    cut = Cut(2 * keys, keys)
    return [exchange.program(problem.schedule, rank, cut) for rank in problem.ranks]


def visible_pairs(problem: Problem, rank: int) -> Counter:
    """(query row, (owner, key row)) that the rank's queries see, by the definition."""
    owners = {
        token: (owner, row)
        for owner, tokens in enumerate(problem.k_tokens)
        for row, token in enumerate(tokens)
    }
    sees = problem.sees[problem.q_tokens[rank]]
    return Counter((i, owners[j]) for i, j in sees.nonzero().tolist())


@pytest.mark.parametrize("in_order", [False, True], ids=["by kind", "in order"])
@pytest.mark.parametrize("name", ALL)
def test_ranks_get_through_and_compute_every_pair_once(name: str, in_order: bool) -> None:
    """The player also holds that every post has its partner and every place is freed."""
    for problem in problems():
        programs = programs_of(ALL[name], problem)
        readers: dict[tuple[int, int], Counter] = {}
        expected = [visible_pairs(problem, rank) for rank in problem.ranks]
        for rank, pairs in enumerate(expected):
            for _, key in pairs:
                readers.setdefault(key, Counter())[rank] = 1
        for backward in (False, True):
            try:
                play = Play(programs, backward=backward, in_order=in_order)
            except (AssertionError, KeyError) as error:
                raise AssertionError(f"{name}, {backward=}: {problem.what}") from error
            for rank, mine in enumerate(play.ranks):
                assert mine.pairs == expected[rank], (name, rank, problem.what)
            sent = [program.sent() for program in programs]
            if backward:
                assert sent_in(play) == sent, problem.what
                for owner, mine in enumerate(play.ranks):
                    for row, readers_found in enumerate(mine.sums[0]):
                        assert readers_found == readers.get((owner, row), Counter()), (
                            f"{name}: gradient of {owner, row} in {problem.what}"
                        )
            else:
                assert [s.kv_rows for s in sent_in(play)] == [s.kv_rows for s in sent]


def changed(programs: list[Program], number: int, change) -> list[Program]:
    """Rank 1's backward pass with the `number`-th action that `change` accepts changed."""
    actions, left = [], number
    for action in programs[1].backward:
        found = change(action)
        if found is not None and left == 0:
            actions += found
        else:
            actions.append(action)
        left -= found is not None
    some = programs[1]
    return [programs[0], Program(1, some.k_lens, some.forward, tuple(actions)), *programs[2:]]


BROKEN = {
    "a place is not freed": lambda a: [] if isinstance(a, Free) else None,
    "gradients do not come home": lambda a: [] if isinstance(a, Add) else None,
    "a post is missing": lambda a: [] if isinstance(a, Post) else None,
    "rows of a message are others": lambda a: (
        [a._replace(sends=tuple(s._replace(rows=((0, s.length),)) for s in a.sends), receives=())]
        if isinstance(a, Post) and a.carries == "keys"
        else None
    ),
    "a place is computed too early": lambda a: (
        [a._replace(place=a.place + 2)] if isinstance(a, Compute) and a.place else None
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_player_finds_what_is_broken(name: str) -> None:
    problem = dense_problem("zigzag", "zigzag", (8, 8, 8), True, (-1, -1))
    programs = programs_of(EXCHANGES["direct"], problem)
    Play(programs, backward=True, in_order=True)
    with pytest.raises((AssertionError, KeyError)):
        Play(changed(programs, 1, BROKEN[name]), backward=True, in_order=True)


def test_a_wrong_order_hangs_where_messages_have_no_kinds() -> None:
    """The posts that gloo may take early, in a network that matches by order alone."""
    hung = 0
    for problem in random_problems(31, 60, longest=9):
        programs = [
            Program(p.rank, p.k_lens, (), tuple(performed(p.backward, in_order=False)))
            for p in programs_of(EXCHANGES["direct"], problem)
        ]
        early = [
            p.replaced(lambda a: a._replace(only=None) if isinstance(a, Post) else a)
            for p in programs
        ]
        Play(early, backward=True, in_order=False)
        try:
            Play(early, backward=True, in_order=True)
        except AssertionError:
            hung += 1
    assert hung > 0


def test_memory_under_way_is_a_few_messages_however_many_ranks() -> None:
    """Of the direct exchange and the ring; all-gather holds everybody's keys, twice for a while."""
    rows = {}
    names = ("direct", "ring", "all_gather")
    for ranks in (4, 8, 16):
        problem = dense_problem("zigzag", "zigzag", (64,) * ranks, True, (-1, -1))
        for name in names:
            program = EXCHANGES[name].program(problem.schedule, ranks - 1, Cut(32, 16))
            rows[name, ranks] = rows_at_once(program, backward=True)
    for name in names:
        grows = rows[name, 16] > rows[name, 8]
        assert grows == EXCHANGES[name].holds_all_keys, rows
    assert rows["direct", 16] <= 4 * 16 + 2 * 32 and rows["all_gather", 16] == 2 * 16 * 64


def test_the_exchange_of_the_documentation_is_one() -> None:
    """docs/adding_a_variant.md: its code, played as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "adding_a_variant.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*def at_once\(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    for problem in problems():
        programs = [names["at_once"](problem.schedule, rank) for rank in problem.ranks]
        for backward, in_order in itertools.product((False, True), repeat=2):
            play = Play(programs, backward=backward, in_order=in_order)
            for rank, mine in enumerate(play.ranks):
                assert mine.pairs == visible_pairs(problem, rank), problem.what
