"""Gloo ranks for tests: a pool that is reused between tests, and fresh ranks for failure tests.

A rank is a spawned process that joins its process group and then answers one call after another.
Calls and answers travel as plain pickles: bytes through a pipe, never shared memory, so that a
rank may be killed at any time.
"""

import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

START_SECONDS = 120.0  # for importing torch and joining the group, on a busy machine
GRACE_SECONDS = 8.0  # after one rank failed, for the others to tell what they saw
POOL_GROUP_SECONDS = 30.0  # the process group's timeout in the pool


@dataclass(frozen=True)
class Outcome:
    """How a call ended on one rank."""

    kind: Literal["result", "error", "died"]
    value: Any = None
    error: str = ""  # the exception's type name
    message: str = ""  # the exception's text
    traceback: str = ""
    exit_code: int | None = None  # of a rank that died; -9 if it was killed
    seconds: float = 0.0

    def describe(self) -> str:
        if self.kind == "died":
            return f"died with exit code {self.exit_code}"
        return self.traceback.rstrip() or "returned"


class RankFailure(Exception):
    """At least one rank raised or died; the message has every rank's traceback."""


class RankTimeout(RankFailure):
    """At least one rank gave no answer in time; the message has its Python stack."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one process group meet: a file, or a TCP store that the parent hosts."""

    world_size: int
    timeout_seconds: float
    folder: Path
    port: int | None = None

    def join(self, rank: int) -> None:
        timeout = timedelta(seconds=self.timeout_seconds)
        if self.port is None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{self.folder}/store",
                rank=rank,
                world_size=self.world_size,
                timeout=timeout,
            )
        else:
            store = dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=timeout)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=self.world_size, timeout=timeout
            )

    def stack_file(self, rank: int) -> Path:
        return self.folder / f"stack{rank}.txt"


def _attempt(seed: int, call: Callable[[], Any]) -> bytes:
    """Runs `call` and pickles how it ended; a value that cannot be pickled is an error too."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    try:
        value = call()
        seconds = time.perf_counter() - start
        return pickle.dumps(Outcome("result", value=value, seconds=seconds))
    except BaseException as error:
        return pickle.dumps(
            Outcome(
                "error",
                error=type(error).__name__,
                message=str(error),
                traceback=traceback.format_exc(),
                seconds=time.perf_counter() - start,
            )
        )


def _serve(connection: Connection, rank: int, rendezvous: Rendezvous) -> None:
    """The life of a rank: join the group, then answer calls until the parent hangs up."""
    torch.set_num_threads(1)
    # A rank's first op imports it, which takes a loaded machine longer than ranks wait to agree.
    importlib.import_module("torch._dynamo")
    stack_file = rendezvous.stack_file(rank).open("w")  # open for life: the handler writes to it
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    connection.send_bytes(_attempt(rank, lambda: None))
    connection.recv_bytes()
    connection.send_bytes(_attempt(rank, lambda: rendezvous.join(rank)))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # a group that is out of step could hang in an ordered shutdown

        def call(request: bytes = request) -> Any:
            fn, ranks, args, kwargs = pickle.loads(request)
            return fn(ranks, *args, **kwargs)

        connection.send_bytes(_attempt(rank, call))


@contextmanager
def rank_environment() -> Iterator[None]:
    """The variables that a spawned rank must find before it imports torch."""
    wanted = {"OMP_NUM_THREADS": "1"}
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):
            wanted["GLOO_SOCKET_IFNAME"] = interface
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class RankProcesses:
    """`world_size` spawned processes that have joined one process group."""

    def __init__(
        self, world_size: int, *, timeout_seconds: float, init: Literal["file", "tcp"] = "file"
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.store: dist.TCPStore | None = None
        port = None
        if init == "tcp":
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port = self.store.port
        elif init != "file":
            raise ValueError(f"init must be 'file' or 'tcp', got {init!r}.")
        self.rendezvous = Rendezvous(world_size, timeout_seconds, self.folder, port)
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        everyone = range(self.rendezvous.world_size)
        with rank_environment():
            for rank in everyone:
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, rank, self.rendezvous), daemon=True
                )
                process.start()
                theirs.close()  # so that a rank's death is seen as the end of its pipe
                self.processes.append(process)
                self.connections.append(mine)
        # They join once all have imported torch, which may take longer than the group's timeout.
        raise_failures(self, everyone, self._collect(everyone, START_SECONDS), "starting")
        outcomes = self.call(everyone, b"join", timeout=START_SECONDS)
        raise_failures(self, everyone, outcomes, "joining the group")

    def call(
        self,
        ranks: Sequence[int],
        request: bytes,
        *,
        timeout: float,
        grace: float | None = None,
        kill: Mapping[int, float] | None = None,
    ) -> dict[int, Outcome]:
        """Sends one pickled call to `ranks`; ranks that give no answer in time are left out."""
        for rank in ranks:
            # A rank that is gone already shows as died when the answers are collected.
            try:
                self.connections[rank].send_bytes(request)
            except (BrokenPipeError, ConnectionResetError):
                continue
        return self._collect(ranks, timeout, grace, kill or {})

    def _collect(
        self,
        ranks: Sequence[int],
        timeout: float,
        grace: float | None = None,
        kill: Mapping[int, float] | None = None,
    ) -> dict[int, Outcome]:
        """Waits for one answer per rank: `timeout` seconds, `grace` seconds after a failure."""
        start = time.monotonic()
        deadline = start + timeout
        to_kill = {rank: start + seconds for rank, seconds in (kill or {}).items()}
        waiting = {self.connections[rank]: rank for rank in ranks}
        outcomes: dict[int, Outcome] = {}
        while waiting and time.monotonic() < deadline:
            wake = min([deadline, *to_kill.values()])
            ready = multiprocessing.connection.wait(
                list(waiting), timeout=max(0.0, wake - time.monotonic())
            )
            for rank in [rank for rank, when in to_kill.items() if when <= time.monotonic()]:
                del to_kill[rank]
                self.processes[rank].kill()
            for connection in ready:
                assert isinstance(connection, Connection), connection
                rank = waiting.pop(connection)
                outcomes[rank] = self._receive(rank, time.monotonic() - start)
                if grace is not None and outcomes[rank].kind != "result":
                    deadline = min(deadline, time.monotonic() + grace)
        return outcomes

    def _receive(self, rank: int, seconds: float) -> Outcome:
        try:
            outcome = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(10)
            return Outcome("died", exit_code=self.processes[rank].exitcode, seconds=seconds)
        assert isinstance(outcome, Outcome), outcome
        return outcome

    def stack(self, rank: int) -> str:
        """The Python stack of a rank that does not answer."""
        pid = self.processes[rank].pid
        if pid is None or not self.processes[rank].is_alive():
            return "not running"
        os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        text = ""
        while not text and time.monotonic() < deadline:
            time.sleep(0.05)
            text = self.rendezvous.stack_file(rank).read_text()
        return text.rstrip() or "no stack: the process takes no signals"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        self.store = None
        shutil.rmtree(self.folder, ignore_errors=True)


def raise_failures(
    processes: RankProcesses, ranks: Sequence[int], outcomes: Mapping[int, Outcome], what: str
) -> None:
    """Raises RankFailure or RankTimeout unless every rank returned."""
    silent = [rank for rank in ranks if rank not in outcomes]
    failed = [rank for rank in ranks if rank in outcomes and outcomes[rank].kind != "result"]
    if not silent and not failed:
        return
    summary = [f"{what}:"]
    if failed:
        summary.append(f"failed on ranks {failed}")
    if silent:
        summary.append(f"no answer from ranks {silent}")
    sections = [
        f"--- rank {rank} ---\n"
        + (
            f"no answer; it is here:\n{processes.stack(rank)}"
            if rank in silent
            else outcomes[rank].describe()
        )
        for rank in ranks
    ]
    kind = RankFailure if failed else RankTimeout
    raise kind("\n".join([" ".join(summary), *sections]))


class RankPool:
    """Ranks that stay alive between tests: a call costs milliseconds, not an import of torch.

    The pool starts with 4 ranks at the first call and is replaced by 6 when a call asks for more.
    Its default group is the whole pool, so that most calls run in a sub-group. A failed call ends
    all ranks, because their state may be out of step; the next call starts new ones.
    """

    def __init__(self, *, start_size: int = 4, max_size: int = 6) -> None:
        self.size = start_size
        self.max_size = max_size
        self.processes: RankProcesses | None = None

    def run(
        self,
        world_size: int | None,
        fn: Callable[..., Any],
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout: float = 60.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Calls `fn(ranks, *args, **kwargs)` on ranks 0..world_size-1, or on exactly `ranks`.

        Args:
            world_size: how many ranks; may be None if `ranks` is given.
            fn: a function of a module that the ranks can import.
            ranks: distinct ranks of the pool, in block order; `fn` gets this list.
            timeout: seconds until ranks without an answer are given up and killed.

        Returns: one result per rank, in the order of `ranks`.
        Raises: RankFailure if a rank raised or died, RankTimeout if one gave no answer.
        The CPU generator of each rank is seeded with its rank before the call.
        """
        chosen = self._choose(world_size, ranks)
        request = pickle.dumps((fn, chosen, args, kwargs))
        processes = self._ready(max(chosen) + 1)
        try:
            outcomes = processes.call(chosen, request, timeout=timeout, grace=GRACE_SECONDS)
            what = f"{getattr(fn, '__qualname__', fn)} on ranks {chosen}"
            raise_failures(processes, chosen, outcomes, what)
        except BaseException:
            self.close()
            raise
        return [outcomes[rank].value for rank in chosen]

    def _choose(self, world_size: int | None, ranks: Sequence[int] | None) -> list[int]:
        if ranks is None:
            if world_size is None:
                raise ValueError("give world_size or ranks.")
            ranks = range(world_size)
        chosen = list(ranks)
        if world_size not in (None, len(chosen)):
            raise ValueError(f"world_size is {world_size}, but ranks has {len(chosen)} entries.")
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"ranks must be distinct and not empty, got {chosen}.")
        if min(chosen) < 0 or max(chosen) >= self.max_size:
            raise ValueError(f"ranks must be in 0..{self.max_size - 1}, got {chosen}.")
        return chosen

    def _ready(self, size: int) -> RankProcesses:
        if size > self.size:
            self.close()
            self.size = self.max_size
        if self.processes is None:
            self.processes = RankProcesses(self.size, timeout_seconds=POOL_GROUP_SECONDS)
        return self.processes

    def close(self) -> None:
        if self.processes is not None:
            self.processes.close()
            self.processes = None


def _do_nothing(ranks: Sequence[int], fn: Callable[..., Any]) -> None:
    pass


def run_fresh(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    init: Literal["file", "tcp"] = "file",
    timeout_seconds: float = 10.0,
    kill: Mapping[int, float] | None = None,
    answer_seconds: float = 60.0,
    **kwargs: Any,
) -> list[Outcome]:
    """Calls `fn(ranks, *args, **kwargs)` on ranks of its own, and tells how it ends.

    The default group is exactly these ranks. They start the call together, and a rank that is done
    stays alive until all have answered, so that its exit does not help the others.

    Args:
        init: the ranks meet in a file, or in a TCP store on a free port that outlives them.
        timeout_seconds: the process group's timeout.
        kill: ranks to kill, with the seconds after the start of the call.
        answer_seconds: until a rank without an answer is an error, RankTimeout.

    Returns: one Outcome per rank: "result", "error", or "died" (killed, or by os._exit).
    """
    everyone = range(world_size)
    request = pickle.dumps((fn, list(everyone), args, kwargs))
    processes = RankProcesses(world_size, timeout_seconds=timeout_seconds, init=init)
    try:
        # The first call only brings fn's module to the ranks, so that no clock runs meanwhile.
        load = pickle.dumps((_do_nothing, [], (fn,), {}))
        raise_failures(
            processes, everyone, processes.call(everyone, load, timeout=START_SECONDS), "importing"
        )
        outcomes = processes.call(everyone, request, timeout=answer_seconds, kill=kill)
        if len(outcomes) < world_size:
            what = f"{getattr(fn, '__qualname__', fn)} on {world_size} fresh ranks"
            raise_failures(processes, everyone, outcomes, what)
        return [outcomes[rank] for rank in everyone]
    finally:
        processes.close()
