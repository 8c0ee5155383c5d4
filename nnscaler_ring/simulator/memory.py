"""How much memory one rank of a call will hold, foretold from its tiles.

Note [A ledger of one rank]
    The passes of `core.engine` over the exchanges of `core.exchange`, with tensors replaced by
    entries in a ledger: who makes what, and until when it lives. A few steps stand for all that
    are alike, so a plan for any number of ranks takes the same time. Components are those of
    Note [Components] in profiler.py, where the same quantity is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nnscaler_ring.core.exchange.rounds import BACKWARD_KEYS, FORWARD_KEYS, Distance, Round
from nnscaler_ring.core.kernels import AttentionKernel
from nnscaler_ring.core.plan.schedule import row_count
from nnscaler_ring.core.plan.tile import UNBOUNDED, Tile
from nnscaler_ring.core.sizes import Memory
from nnscaler_ring.core.sums.online_softmax import ROWS_AT_ONCE
from nnscaler_ring.simulator.call import SimulatedCall

ALIKE = 3
"""Distances at the near end, and at the far end, whose steps stand for all."""


@dataclass(frozen=True)
class KernelTraits:
    """What a kernel makes, for those who only count.

    Args:
        calls: the tiles that it computes in one call each.
        pads_heads: results have the larger of head_dim and v_head_dim.
        short_rows: below so many query rows a backward pass is computed in float32.
        computed_pairs: of a call; more than the visible ones where hidden ones are computed too.
        is_short: whether a call has so few query rows that the kernel is slower.
    """

    calls: Callable[[Sequence[Tile]], Sequence[Tile]] = lambda tiles: tiles
    pads_heads: bool = False
    short_rows: int = 0
    computed_pairs: Callable[[Tile], int] = Tile.pairs
    is_short: Callable[[Tile], bool] = lambda call: False


def traits_of(kernel: AttentionKernel) -> KernelTraits:
    """The traits of a kernel at hand; those of fused kernels in general where nothing is known."""

    def calls(tiles: Sequence[Tile]) -> Sequence[Tile]:
        return [tile for call in kernel.calls(tiles, plain=True) for tile in call.tiles]

    if kernel.name == "torch_cpu":
        from nnscaler_ring.core.kernels.torch_cpu import FULL_BLOCK_ROWS

        return KernelTraits(calls, True, FULL_BLOCK_ROWS, _pairs_in_blocks, _is_short)
    return KernelTraits(calls)


def _pairs_in_blocks(tile: Tile) -> int:
    """torch's fused CPU kernel computes masked calls whole, and causal ones by blocks of rows."""
    nq, nk = tile.q1 - tile.q0, tile.k1 - tile.k0
    if _needs_mask(tile) or tile.hi == UNBOUNDED:
        return nq * nk
    rows = 64 if _is_short(tile) else 256
    return sum(min(rows, nq - start) * min(start + rows, nk) for start in range(0, nq, rows))


def _is_short(tile: Tile) -> bool:
    """torch's fused CPU kernel takes 64 rows at a time instead of 256 below this length."""
    return tile.q1 - tile.q0 < 768


def _needs_mask(tile: Tile) -> bool:
    """torch's fused CPU kernel knows full calls, and causal ones from the top left corner."""
    if tile.hi == UNBOUNDED:
        return tile.lo != -UNBOUNDED
    return tile.lo != -UNBOUNDED or tile.hi != tile.k0 - tile.q0


def predict_memory(
    call: SimulatedCall, rank: int, traits: KernelTraits, *, backward: bool
) -> Memory:
    """The peak of one rank's attention, forward or forward and backward.

    Not in it: score matrices of kernel="reference", O(rows * keys) of a tile, and the few masks
    of bands that torch_cpu makes once and keeps, under 1 MB each.
    """
    ledger = _Ledger(call, rank, traits)
    ledger.forward()
    forward = ledger.peak
    if backward:
        ledger = _Ledger(call, rank, traits)
        ledger.backward()
        if ledger.peak.total() > forward.total():
            return Memory(dict(ledger.peak))
    return Memory({name: n for name, n in forward.items() if n})


@dataclass
class _Sum:
    """A `PartialOutput`, or `RowSum`s: nothing yet, kept blocks, or sums in float32.

    `parts`: numbers in a row of each tensor.
    """

    name: str
    rows: int
    parts: tuple[int, ...]
    itemsize: int | None = None
    """Of the numbers it holds now; None: nothing yet."""


@dataclass
class _Ledger:
    """Note [A ledger of one rank]. Entries are `component:what`."""

    call: SimulatedCall
    rank: int
    traits: KernelTraits
    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        sizes = self.call.sizes
        self.schedule = self.call.schedule
        self.rows = self.schedule.q_lens[self.rank]
        self.keys = self.schedule.k_lens[self.rank]
        self.half = sizes.itemsize != sizes.sum_itemsize
        self.kv_row = sizes.kv_numbers * sizes.itemsize
        self.hold("q", self.rows * sizes.q_numbers * sizes.itemsize)
        self.hold("kv", self.keys * self.kv_row)

    def hold(self, entry: str, size: int) -> None:
        """Make an entry, or make it this large."""
        self.live[entry] = size
        total = self.live.total()
        if total > self.peak.total():
            self.peak = Counter()
            for name, n in self.live.items():
                self.peak[name.partition(":")[0]] += n

    def drop(self, *entries: str) -> None:
        for entry in entries:
            self.live.pop(entry, None)

    # The two passes of core/engine.py.

    def forward(self) -> None:
        sizes = self.call.sizes
        self.partial = _Sum("partial", self.rows, (sizes.out_numbers,))
        exchange = {
            "direct": self._direct_forward,
            "ring": self._ring_forward,
            "all_gather": self._all_gather_forward,
        }[self.call.exchange]
        exchange()
        if self.partial.itemsize is None:
            self._to_sum(self.partial, extra=sizes.lse_bytes)
        if self.partial.itemsize != sizes.itemsize:
            self.hold("sums:out", self.rows * sizes.out_numbers * sizes.itemsize)
        self.hold("sums:lse", self.rows * sizes.lse_bytes)

    def backward(self) -> None:
        sizes = self.call.sizes
        item = sizes.itemsize
        self.hold("results:out", self.rows * (2 * sizes.out_numbers * item + sizes.lse_bytes))
        self.dq = _Sum("dq", self.rows, (sizes.q_numbers,))
        self.home = _Sum("home", self.keys, (sizes.k_numbers, sizes.v_numbers))
        exchange = {
            "direct": self._direct_backward,
            "ring": self._ring_backward,
            "all_gather": self._all_gather_backward,
        }[self.call.exchange]
        exchange()
        for total in (self.dq, self.home):
            if total.itemsize is None:
                self._to_sum(total)
            if total.itemsize != item:
                self.hold(f"sums:{total.name} result", total.rows * sum(total.parts) * item)

    def compute(self, tiles: Sequence[Tile]) -> None:
        """The tiles of a forward step."""
        sizes = self.call.sizes
        numbers = self._padded_numbers(sizes.v_head_dim)
        for tile in self._unlike(self.traits.calls(tiles)):
            nq = tile.q1 - tile.q0
            self.hold("block:new", nq * (numbers * sizes.itemsize + sizes.lse_bytes))
            self.drop("block:old")
            if self.partial.itemsize is None and nq == self.rows:
                self.partial.itemsize = sizes.itemsize
                self.drop("block:new")
                self.hold("sums:partial", nq * (numbers * sizes.itemsize + sizes.lse_bytes))
                continue
            self._to_sum(self.partial, extra=sizes.lse_bytes)
            self.hold("sums:weight", 2 * nq * sizes.lse_bytes)
            self.hold("sums:weight", nq * sizes.lse_bytes)
            if self.half:
                rows = min(nq, ROWS_AT_ONCE)
                cast = rows * sizes.out_numbers * sizes.sum_itemsize
                self.hold("sums:weight", nq * sizes.lse_bytes + cast)
            self.drop("sums:weight", "block:new")
            self.hold("block:old", nq * (numbers * sizes.itemsize + sizes.lse_bytes))

    def compute_gradients(self, tiles: Sequence[Tile], keys: _Sum) -> None:
        """The tiles of a backward step; `keys` takes dk and dv."""
        sizes = self.call.sizes
        width = max(sizes.head_dim, sizes.v_head_dim) if self.traits.pads_heads else 0
        for tile in self._unlike(self.traits.calls(tiles)):
            nq, nk = tile.q1 - tile.q0, tile.k1 - tile.k0
            item = sizes.itemsize
            q_numbers, kv_numbers = sizes.q_numbers, sizes.kv_numbers
            if width:
                q_numbers = sizes.batch * sizes.num_heads * width
                kv_numbers = 2 * sizes.batch * sizes.num_kv_heads * width
            if nq < self.traits.short_rows and self.half:
                item = sizes.sum_itemsize
                self.hold(
                    "temp_scores:cast",
                    item * (nq * (sizes.q_numbers + 2 * sizes.out_numbers) + nk * sizes.kv_numbers),
                )
            self.hold("block:dq", nq * q_numbers * item)
            self.hold("block:dkv", nk * kv_numbers * item)
            self.drop("temp_scores:cast")
            for total, block, rows in ((self.dq, "block:dq", nq), (keys, "block:dkv", nk)):
                if total.itemsize is None and rows == total.rows:
                    total.itemsize = item
                    self.live[f"sums:{total.name}"] = self.live.pop(block)
                else:
                    self._to_sum(total)
            self.drop("block:dq", "block:dkv")

    def _to_sum(self, total: _Sum, extra: int = 0) -> None:
        """Before a second block is added: a float32 sum, made beside what was kept."""
        wide = self.call.sizes.sum_itemsize
        if total.itemsize == wide:
            return
        kept = self.live.get(f"sums:{total.name}", 0)
        made = 0
        for numbers in total.parts:  # one tensor after another
            made += total.rows * (numbers * wide + extra)
            self.hold("sums:making", made)
            kept -= total.rows * (numbers * (total.itemsize or 0) + extra)
            self.live[f"sums:{total.name}"] = max(kept, 0)
        del self.live["sums:making"]
        self.live[f"sums:{total.name}"] = made
        total.itemsize = wide

    def _padded_numbers(self, head_dim: int) -> int:
        sizes = self.call.sizes
        width = max(sizes.head_dim, sizes.v_head_dim) if self.traits.pads_heads else head_dim
        return sizes.batch * sizes.num_heads * width

    def _unlike(self, tiles: Sequence[Tile]) -> list[Tile]:
        """The first of the tiles that are of one size and shape, and one more, in order."""
        seen: Counter[tuple[int, ...]] = Counter()
        chosen = []
        for tile in tiles:
            shape = (tile.q1 - tile.q0, tile.k1 - tile.k0, *tile.window())
            seen[shape] += 1
            if seen[shape] <= 2:
                chosen.append(tile)
        return chosen

    # The exchanges of core/exchange.

    def _rounds(self, keys: int) -> list[Round]:
        """The messages at some distances, of which a few stand for all of a distance."""
        ranks, longest = self.schedule.world_size, max(self.schedule.k_lens)
        distances = sorted({*range(1, min(ALIKE + 1, ranks)), *range(max(1, ranks - ALIKE), ranks)})
        found: list[Round] = []
        for distance in distances:
            some = Distance.of(self.schedule, self.rank, distance)
            count = max(some.parts(longest, keys))
            found += some.rounds(longest, keys, sorted({*range(min(ALIKE, count)), count - 1}))
        return found

    def _local_tiles(self) -> list[Tile]:
        return self.schedule.tiles(self.rank, (self.rank,))

    def _post(self, number: int, rounds: Sequence[Round]) -> None:
        if number < len(rounds):
            incoming, outgoing = rounds[number].incoming, rounds[number].outgoing
            if not outgoing.is_one_piece(self.call.sizes.batch):
                self.hold(f"messages:packed {number}", row_count(outgoing.rows) * self.kv_row)
            self.hold(f"messages:in {number}", row_count(incoming.rows) * self.kv_row)

    def _arrive(self, number: int, rounds: Sequence[Round]) -> None:
        self.drop(f"messages:packed {number}")
        self.live[f"kv_chunk:{number}"] = self.live.pop(f"messages:in {number}")
        self._post(number + 1, rounds)

    def _direct_forward(self) -> None:
        rounds = self._rounds(FORWARD_KEYS)
        self._post(0, rounds)
        self.compute(self._local_tiles())
        for number, round_ in enumerate(rounds):
            self._arrive(number, rounds)
            self.drop(f"kv_chunk:{number - 1}")
            self.compute(round_.incoming.tiles)

    def _direct_backward(self) -> None:
        sizes = self.call.sizes
        rounds = self._rounds(BACKWARD_KEYS)
        self._post(0, rounds)
        self.compute_gradients(self._local_tiles(), self.home)
        for number, round_ in enumerate(rounds):
            self.drop(f"kv_chunk:{number - 1}")
            self._arrive(number, rounds)
            incoming, outgoing = round_.incoming, round_.outgoing
            rows_in, rows_out = row_count(incoming.rows), row_count(outgoing.rows)
            keys = _Sum(f"message {number}", rows_in, (sizes.k_numbers, sizes.v_numbers))
            self.compute_gradients(incoming.tiles, keys)
            item = sizes.sum_itemsize if incoming.summed else sizes.itemsize
            made = self.live.pop(f"sums:message {number}", 0)
            self.hold(f"messages:home {number}", made)
            if keys.itemsize != item and rows_in:
                self.hold("messages:cast", rows_in * sizes.kv_numbers * item)
                self.drop("messages:cast")
                self.hold(f"messages:home {number}", rows_in * sizes.kv_numbers * item)
            back = sizes.sum_itemsize if outgoing.summed else sizes.itemsize
            size = rows_out * sizes.kv_numbers * back
            self.hold(f"messages:returning {number}", size)
            self.drop(f"messages:returning {number - 2}")
            self._settle(number - 1, rounds)
        self.drop(f"kv_chunk:{len(rounds) - 1}")
        self._settle(len(rounds) - 1, rounds)
        self.live = Counter(
            {name: n for name, n in self.live.items() if not name.startswith("messages")}
        )

    def _settle(self, number: int, rounds: Sequence[Round]) -> None:
        if number >= 0:
            self.drop(f"messages:home {number}")
            if rounds[number].outgoing.rows:
                self._to_sum(self.home)

    def _sources(self) -> list[int]:
        """The ring's order; a few distances stand for all."""
        ranks = self.schedule.world_size
        far = range(max(ALIKE + 1, ranks - ALIKE), ranks)
        return [(self.rank - d) % ranks for d in (*range(min(ALIKE + 1, ranks)), *far)]

    def _ring_forward(self) -> None:
        sources = self._sources()
        for distance, source in enumerate(sources):
            for following in sources[distance + 1 : distance + 2]:
                size = self.schedule.k_lens[following] * self.kv_row
                self.hold(f"messages:{distance + 1}", size)
            self.drop(f"kv_chunk:{distance - 1}")
            self.compute(self.schedule.tiles(self.rank, (source,)))
            if f"messages:{distance + 1}" in self.live:
                self.live[f"kv_chunk:{distance + 1}"] = self.live.pop(f"messages:{distance + 1}")

    def _ring_backward(self) -> None:
        sizes = self.call.sizes
        wide = sizes.kv_numbers * sizes.sum_itemsize
        sources = self._sources()
        for distance, source in enumerate(sources):
            rows = self.schedule.k_lens[source]
            for following in sources[distance + 1 : distance + 2]:
                size = self.schedule.k_lens[following] * self.kv_row
                self.hold(f"messages:{distance + 1}", size)
            tiles = self.schedule.tiles(self.rank, (source,))
            if distance == 0:
                self.compute_gradients(tiles, self.home)
            else:
                self.drop(f"kv_chunk:{distance - 1}")
                keys = _Sum(f"message {distance}", rows, (sizes.k_numbers, sizes.v_numbers))
                self.compute_gradients(tiles, keys)
                self.drop("messages:sums")
                if distance > 1:
                    self._to_sum(keys)
                self.drop("messages:so far")
                following = sources[(distance + 1) % len(sources)]
                self.hold("messages:so far", self.schedule.k_lens[following] * wide)
                if keys.itemsize != sizes.sum_itemsize:
                    self.hold("messages:sums", rows * wide)
                    self.drop(f"sums:message {distance}")
                else:
                    self.live["messages:sums"] = self.live.pop(f"sums:message {distance}")
            if f"messages:{distance + 1}" in self.live:
                self.live[f"kv_chunk:{distance + 1}"] = self.live.pop(f"messages:{distance + 1}")
        if len(sources) > 1:
            self._to_sum(self.home)
        self.live = Counter(
            {n: size for n, size in self.live.items() if not n.startswith(("messages", "kv_chunk"))}
        )

    def _gather(self, name: str, numbers: int) -> None:
        lens, item = self.schedule.k_lens, self.call.sizes.itemsize
        if len(lens) == 1:
            return
        self.hold("messages:padded", max(lens) * numbers * item)
        self.hold("messages:gathered", len(lens) * max(lens) * numbers * item)
        if self.call.sizes.batch > 1 or min(lens) != max(lens):
            self.drop("messages:padded")
            self.hold("messages:joined", sum(lens) * numbers * item)
        self.drop("messages:padded", "messages:gathered", "messages:joined")
        self.hold(f"kv_chunk:{name}", sum(lens) * numbers * item)

    def _all_gather_forward(self) -> None:
        sizes = self.call.sizes
        self._gather("k", sizes.k_numbers)
        self._gather("v", sizes.v_numbers)
        self.compute(self.schedule.tiles(self.rank, range(self.schedule.world_size)))

    def _all_gather_backward(self) -> None:
        sizes, lens = self.call.sizes, self.schedule.k_lens
        self._gather("k", sizes.k_numbers)
        self._gather("v", sizes.v_numbers)
        keys = _Sum("all keys", sum(lens), (sizes.k_numbers, sizes.v_numbers))
        self.compute_gradients(self.schedule.tiles(self.rank, range(len(lens))), keys)
        if len(lens) == 1:
            self.home.itemsize = keys.itemsize
            self.live["sums:home"] = self.live.pop("sums:all keys")
            return
        for number, numbers in enumerate((sizes.k_numbers, sizes.v_numbers)):
            size = len(lens) * max(lens) * numbers * sizes.sum_itemsize
            self.hold("messages:padded", size)
            self.hold("messages:in order", size)
            self.hold(f"sums:mine {number}", max(lens) * numbers * sizes.sum_itemsize)
            self.drop("messages:padded", "messages:in order")
        self.drop("sums:mine 0", "sums:mine 1", "sums:all keys", "kv_chunk:k", "kv_chunk:v")
        self.home.itemsize = sizes.sum_itemsize
        self.live["sums:home"] = self.keys * sizes.kv_numbers * sizes.sum_itemsize
