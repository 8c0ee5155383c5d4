"""Plays the programs of all ranks against each other: rows are pairs of integers, nothing moves.

What is sent is what is received, in kind, order and rows; nothing is read before it is there, and
nothing is left over. A network that matches by order (NCCL) or by kind (gloo) is played beside it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nnscaler_ring.core.exchange.program import (
    OWN,
    Action,
    Add,
    Compute,
    Free,
    Gather,
    Join,
    Post,
    Program,
    Scatter,
    Sent,
    Wait,
    performed,
)
from nnscaler_ring.core.plan.schedule import KeyRows

Row = tuple[int, int]
"""A row of K and V: its owner, and its number in the owner's shard."""

Sums = list[Counter[int]]
"""For every row of a place how often each rank's gradient is in its sum."""


@dataclass
class Message:
    """One side of a message; `form` is what both sides must think of it alike.

    The sender's side has the content, the receiver's has the place for it.
    """

    transfer: "Transfer"
    sender: int
    receiver: int
    form: tuple[object, ...]
    place: int = OWN
    content: tuple[list[Row], Sums] | None = None
    done: bool = False

    @property
    def length(self) -> int:
        return self.form[1]  # type: ignore[return-value]


@dataclass
class Transfer:
    """A post under way."""

    rank: int
    messages: list[Message]
    open: int = 0


@dataclass
class Rank:
    """One rank in one pass."""

    program: Program
    backward: bool
    places: dict[int, list[Row]] = field(default_factory=dict)
    sums: dict[int, Sums] = field(default_factory=dict)
    arrived: dict[int, tuple[list[Row], Sums]] = field(default_factory=dict)
    transfers: dict[int, Transfer] = field(default_factory=dict)
    computed: dict[int, list[Row]] = field(default_factory=dict)
    pairs: Counter[tuple[int, Row]] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    expected: dict[int, KeyRows] = field(default_factory=dict)
    made: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        rank = self.program.rank
        own = [(rank, row) for row in range(self.program.k_lens[rank])]
        self.places[OWN] = own
        if self.backward:
            self.sums[OWN] = [Counter() for _ in own]


class Play:
    """All ranks' programs in one pass; `in_order`: as NCCL matches messages."""

    def __init__(self, programs: Sequence[Program], *, backward: bool, in_order: bool) -> None:
        self.ranks = [Rank(program, backward) for program in programs]
        self.in_order = in_order
        self.scattered = 0
        self.queues: list[list[Transfer]] = [[] for _ in programs]
        self.collective: dict[int, list[object]] = {rank: [] for rank in range(len(programs))}
        rest = [
            self._run(rank, performed(rank.program.actions(backward=backward), in_order=in_order))
            for rank in self.ranks
        ]
        running = set(range(len(programs)))
        while running:
            before = self._progress()
            for number in sorted(running):
                if next(rest[number], None) is None:
                    running.discard(number)
            self._network()
            assert not running or self._progress() != before, f"ranks {running} wait for each other"
        for rank in self.ranks:
            what = f"rank {rank.program.rank}"
            assert set(rank.places) == {OWN} and not rank.arrived, f"{what}: a place is not freed"
            assert set(rank.sums) <= {OWN}, f"{what}: sums that nobody sent"
            assert not rank.transfers, f"{what}: a transfer that nobody waited for"
        assert not any(self.queues), "a message that nobody expected"

    def _progress(self) -> object:
        done = [(len(r.transfers), len(r.pairs), len(r.made), r.sent.total()) for r in self.ranks]
        return done, [len(q) for q in self.queues], [len(c) for c in self.collective.values()]

    def _run(self, me: Rank, actions: Iterator[Action]) -> Iterator[bool]:
        number = me.program.rank
        transfers: set[int] = set()
        for action in actions:
            match action:
                case Post():
                    assert action.transfer not in transfers, action
                    transfers.add(action.transfer)
                    self._post(me, action)
                case Wait():
                    while me.transfers[action.transfer].open:
                        yield True
                    del me.transfers[action.transfer]
                case Compute():
                    self._compute(me, action)
                case Free():
                    assert action.place != OWN, action
                    del me.places[action.place]
                case Add():
                    rows, sums = me.arrived.pop(action.place)
                    runs = [n for start, stop in action.rows for n in range(start, stop)]
                    assert [me.places[action.to][n] for n in runs] == rows, action
                    for n, some in zip(runs, sums, strict=True):
                        me.sums[action.to][n].update(some)
                case Join():
                    self._make(me, action.place)
                    me.places[action.place] = [
                        row for place, a, b in action.pieces for row in me.places[place][a:b]
                    ]
                case Gather() | Scatter():
                    self.collective[number].append(action)
                    count = len(self.collective[number])
                    while any(len(some) < count for some in self.collective.values()):
                        yield True
                    kinds = {type(some[count - 1]) for some in self.collective.values()}
                    assert len(kinds) == 1, kinds
                    self._collective(me, action)
                    self.collective[number].append("done")
                    while any(len(some) < count + 1 for some in self.collective.values()):
                        yield True

    def _make(self, me: Rank, place: int) -> None:
        assert place not in me.made and place != OWN, f"place {place} is made twice"
        me.made.add(place)

    def _post(self, me: Rank, action: Post) -> None:
        rank, messages = me.program.rank, []
        transfer = Transfer(rank, messages)
        keys = action.carries == "keys"
        for send in action.sends:
            runs = [n for start, stop in send.rows for n in range(start, stop)]
            place = me.places[send.place] if keys else me.sums[send.place]
            assert len(runs) == send.length and (not send.whole or runs == [*range(len(place))])
            rows = place if keys else me.computed[send.place]
            sums = [] if keys else [me.sums[send.place][n] for n in runs]
            content = [rows[n] for n in runs], sums
            me.sent["keys" if keys else "wide" if send.wide else "narrow"] += len(runs)
            runs_of_keys = len(send.rows) if keys else 0  # gradients of K and V go apart anyway
            form = (action.carries, len(runs), runs_of_keys, keys and send.whole, send.wide)
            messages.append(Message(transfer, rank, send.to, form, content=content))
        for place in {send.place for send in action.sends} if not keys else ():
            total = sum(send.length for send in action.sends if send.place == place)
            assert total == len(me.sums.pop(place)), "a sum leaves in part"
        for receive in action.receives:
            self._make(me, receive.place)
            form = (
                action.carries,
                receive.length,
                len(receive.rows) if keys else 0,
                keys and receive.whole,
                receive.wide,
            )
            messages.append(Message(transfer, receive.sender, rank, form, receive.place))
            me.expected[receive.place] = receive.rows
            if not receive.length and keys:
                me.places[receive.place] = []
            elif not receive.length:
                me.arrived[receive.place] = [], []
        messages[:] = [m for m in messages if m.length]  # empty ones are not sent
        transfer.open = len(messages)
        me.transfers[action.transfer] = transfer
        if messages:
            self.queues[rank].append(transfer)

    def _compute(self, me: Rank, action: Compute) -> None:
        rows = me.places[action.place]
        assert rows == [(s, n) for s, start, stop in action.rows for n in range(start, stop)]
        me.computed[action.place] = rows
        keys = [*range(len(rows))]
        if action.taken is not None:
            keys = [n for some in action.taken for n in keys[slice(*some)]]
        read = set()
        for tile in action.tiles:
            for i in range(tile.q0, tile.q1):
                for j in range(max(tile.k0, i + tile.lo), min(tile.k1, i + tile.hi + 1)):
                    me.pairs[i, rows[keys[j]]] += 1
                    read.add(keys[j])
        if me.backward:
            sums = me.sums.setdefault(action.place, [Counter() for _ in rows])
            for n in read:
                sums[n][me.program.rank] += 1

    def _collective(self, me: Rank, action: Gather | Scatter) -> None:
        lens = me.program.k_lens
        me.sent["keys" if isinstance(action, Gather) else "wide"] += (len(lens) - 1) * max(lens)
        if isinstance(action, Gather):
            self._make(me, action.place)
            rows = [(source, row) for source, n in enumerate(lens) for row in range(n)]
            me.places[action.place] = rows
            return
        start = sum(lens[: me.program.rank])
        for other in self.ranks:
            sums = other.sums[action.place]
            for n, mine in enumerate(me.sums[OWN]):
                mine.update(sums[start + n])
        self.scattered += 1
        if self.scattered % len(self.ranks) == 0:
            for other in self.ranks:
                del other.sums[action.place]

    # The network.

    def _network(self) -> None:
        while self._in_order() if self.in_order else self._by_kind():
            pass

    def _in_order(self) -> bool:
        """Finish whole sets of posts at the heads of queues that meet each other."""
        heads = {rank: queue[0] for rank, queue in enumerate(self.queues) if queue}
        done = set(heads)
        while True:
            lost = {
                rank
                for rank in done
                for peer in _peers(heads[rank])
                if peer not in done or not _meet(heads[rank], heads[peer])
            }
            if not lost:
                break
            done -= lost
        for rank in done:
            for message in heads[rank].messages:
                if message.content is not None:
                    other = next(
                        m
                        for m in heads[message.receiver].messages
                        if m.sender == rank and m.content is None and not m.done
                    )
                    self._deliver(message, other)
        for rank in done:
            self.queues[rank].pop(0)
        return bool(done)

    def _by_kind(self) -> bool:
        """Finish the first messages of a kind between two ranks."""
        first: dict[tuple[object, ...], Message] = {}
        for queue in self.queues:
            for transfer in queue:
                for m in transfer.messages:
                    if not m.done:
                        key = (m.content is not None, m.sender, m.receiver, m.form[0])
                        first.setdefault(key, m)
        met = [
            (message, first[(False, *key[1:])])
            for key, message in first.items()
            if key[0] and (False, *key[1:]) in first
        ]
        for message, other in met:
            self._deliver(message, other)
        for queue in self.queues:
            queue[:] = [transfer for transfer in queue if transfer.open]
        return bool(met)

    def _deliver(self, message: Message, other: Message) -> None:
        assert message.content is not None
        me = self.ranks[message.receiver]
        rows, sums = message.content
        runs = me.expected[other.place]
        assert rows == [(s, n) for s, start, stop in runs for n in range(start, stop)], other
        assert message.form == other.form, (message.form, other.form)
        if message.form[0] == "keys":
            me.places[other.place] = rows
        else:
            me.arrived[other.place] = rows, sums
        for some in (message, other):
            some.done = True
            some.transfer.open -= 1


def sent_in(play: Play) -> list[Sent]:
    """What every rank sent."""
    return [Sent(r.sent["keys"], r.sent["narrow"], r.sent["wide"]) for r in play.ranks]


def _peers(transfer: Transfer) -> set[int]:
    return {m.sender if m.content is None else m.receiver for m in transfer.messages}


def _meet(one: Transfer, other: Transfer) -> bool:
    """Whether two posts hold the same messages between their ranks, in the same order."""

    def between(transfer: Transfer, sender: int, receiver: int) -> list[tuple[object, ...]]:
        return [
            m.form[:2] for m in transfer.messages if (m.sender, m.receiver) == (sender, receiver)
        ]

    pairs = (one.rank, other.rank), (other.rank, one.rank)
    return all(between(one, *pair) == between(other, *pair) for pair in pairs)
