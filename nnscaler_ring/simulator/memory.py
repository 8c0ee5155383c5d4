"""How much memory one rank of a call will hold, foretold from its tiles.

Note [A ledger of one rank]
    The passes of `core.engine` over the rank's program, with tensors replaced by entries in a
    ledger: who makes what, and until when it lives. A few messages stand for all that are alike.
    Components are those of Note [Components] in profiler.py, where the same quantity is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nnscaler_ring.core.exchange import Program
from nnscaler_ring.core.exchange.program import (
    OWN,
    Add,
    Compute,
    Cut,
    Free,
    Gather,
    Join,
    Post,
    Scatter,
    Wait,
    performed,
    travels_apart,
)
from nnscaler_ring.core.kernels import AttentionKernel
from nnscaler_ring.core.plan.tile import UNBOUNDED, Tile
from nnscaler_ring.core.sizes import Memory
from nnscaler_ring.core.sums.online_softmax import ROWS_AT_ONCE
from nnscaler_ring.simulator.call import SimulatedCall

ALIKE = 3
"""Messages of a pair of ranks that stand for all but the last: see `Cut`."""


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
    program = call.program(rank, Cut(listed=ALIKE))
    ledger = _Ledger(call, program, traits)
    ledger.forward()
    forward = ledger.peak
    if backward:
        ledger = _Ledger(call, program, traits)
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
    program: Program
    traits: KernelTraits
    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        sizes = self.call.sizes
        self.schedule = self.call.schedule
        self.rows = self.schedule.q_lens[self.program.rank]
        self.keys = self.schedule.k_lens[self.program.rank]
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
        self.perform(backward=False)
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
        self.sums = {OWN: self.home}
        self.perform(backward=True)
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

    # The actions of an exchange: core/exchange/perform.py.

    def perform(self, *, backward: bool) -> None:
        """A pass of the rank's program."""
        for action in performed(self.program.actions(backward=backward), in_order=False):
            match action:
                case Post() if action.carries == "keys":
                    self._post_keys(action)
                case Post():
                    self._post_gradients(action)
                case Wait():
                    self.drop(f"messages:out {action.transfer}")
                case Compute():
                    self._compute(action, backward)
                case Free():
                    self.drop(f"messages:in {action.place}")
                    self.drop(*(f"kv_chunk:{action.place} {part}" for part in ("", "k", "v")))
                case Add():
                    self._to_sum(self.sums[action.to])
                    self.drop(f"messages:in {action.place}")
                case Join():
                    rows = sum(stop - start for _, start, stop in action.pieces)
                    self.hold(f"kv_chunk:{action.place} ", rows * self.kv_row)
                case Gather():
                    self._gather(f"kv_chunk:{action.place} k", self.call.sizes.k_numbers)
                    self._gather(f"kv_chunk:{action.place} v", self.call.sizes.v_numbers)
                case Scatter():
                    self._scatter(self.sums.pop(action.place))

    def _post_keys(self, action: Post) -> None:
        batch = self.call.sizes.batch
        packed = sum(
            send.length
            for send in action.sends
            if not travels_apart(len(send.rows), send.whole, batch)
        )
        if packed:
            self.hold(f"messages:out {action.transfer}", packed * self.kv_row)
        for receive in action.receives:
            self.hold(f"messages:in {receive.place}", receive.length * self.kv_row)

    def _post_gradients(self, action: Post) -> None:
        sizes = self.call.sizes
        out = f"messages:out {action.transfer}"
        sent = 0
        for send in action.sends:
            total = self.sums[send.place]
            item = sizes.sum_itemsize if send.wide else sizes.itemsize
            if send.whole and total.itemsize == item:
                sent += self.live.pop(f"sums:{total.name}", 0)
                self.live[out] = sent
            else:
                sent += send.length * sizes.kv_numbers * item
                self.hold(out, sent)
        for place in {send.place for send in action.sends}:
            self.drop(f"sums:{self.sums.pop(place).name}")
        for receive in action.receives:
            item = sizes.sum_itemsize if receive.wide else sizes.itemsize
            self.hold(f"messages:in {receive.place}", receive.length * sizes.kv_numbers * item)

    def _compute(self, action: Compute, backward: bool) -> None:
        place, sizes = action.place, self.call.sizes
        if f"messages:in {place}" in self.live:
            self.live[f"kv_chunk:{place} "] = self.live.pop(f"messages:in {place}")
        if not backward:
            self.compute(action.tiles)
            return
        if place not in self.sums:
            rows = sum(stop - start for _, start, stop in action.rows)
            parts = sizes.k_numbers, sizes.v_numbers
            self.sums[place] = _Sum(f"place {place}", rows, parts)
        self.compute_gradients(action.tiles, self.sums[place])

    def _gather(self, name: str, numbers: int) -> None:
        lens, item = self.schedule.k_lens, self.call.sizes.itemsize
        self.hold("messages:padded", max(lens) * numbers * item)
        self.hold("messages:gathered", len(lens) * max(lens) * numbers * item)
        if self.call.sizes.batch > 1 or min(lens) != max(lens):
            self.drop("messages:padded")
            self.hold("messages:joined", sum(lens) * numbers * item)
        self.drop("messages:padded", "messages:gathered", "messages:joined")
        self.hold(name, sum(lens) * numbers * item)

    def _scatter(self, keys: _Sum) -> None:
        sizes, lens = self.call.sizes, self.schedule.k_lens
        for number, numbers in enumerate(keys.parts):
            size = len(lens) * max(lens) * numbers * sizes.sum_itemsize
            self.hold("messages:padded", size)
            self.hold("messages:in order", size)
            self.hold(f"sums:mine {number}", max(lens) * numbers * sizes.sum_itemsize)
            self.drop("messages:padded", "messages:in order")
        self.drop("sums:mine 0", "sums:mine 1", f"sums:{keys.name}")
        self.home.itemsize = sizes.sum_itemsize
        self.live["sums:home"] = self.keys * sizes.kv_numbers * sizes.sum_itemsize
