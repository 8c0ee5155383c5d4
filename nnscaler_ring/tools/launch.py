"""Local ranks: one spawned process each, joined in one process group, that call one function.

Note [How ranks end]
    A rank that is done stays until all have answered: its exit would break connections that the
    others still use. When one fails, all are killed, and the failure that came first is shown:
    the others only see that a peer is gone. When the parent is gone, the ranks end themselves.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnscaler_ring.core.ranks.groups import set_agreement_timeout

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""The device types that ranks can compute on, and how they talk to each other there."""

LEAVE_SECONDS = 10.0
"""How long ranks may take to leave their group before they are killed."""


class RankError(RuntimeError):
    """A rank raised or died; the message names it and holds its traceback."""


@dataclass(frozen=True)
class Rank:
    """What a function that runs on a rank is told.

    `group` are all ranks in block order, to be passed as `process_group`; `report` sends any small
    value that can be pickled to the parent's `on_report`; `folder` is for files, the same for all
    ranks, and removed after them.
    """

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[Any], None]
    folder: Path

    @property
    def group(self) -> list[int]:
        """All ranks."""
        return list(range(self.world_size))


def check_ranks(world_size: int, device: str) -> None:
    """Whether this machine can run so many ranks on that device type.

    Raises:
        ValueError: it cannot; with the reason.
    """
    if device not in BACKENDS:
        raise ValueError(f"device must be one of {tuple(BACKENDS)}, got {device!r}.")
    if world_size < 1:
        raise ValueError(f"ranks must be at least 1, got {world_size}.")
    if not dist.is_available() or not dist.is_backend_available(BACKENDS[device]):
        raise ValueError(f"this torch has no {BACKENDS[device]}, which ranks on {device} need.")
    if device == "cuda" and world_size > torch.cuda.device_count():
        raise ValueError(
            f"ranks on cuda need one GPU each, got {world_size} ranks and "
            f"{torch.cuda.device_count()} GPUs; use fewer ranks, or device cpu."
        )


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    device: str = "cpu",
    on_report: Callable[[int, Any], None] | None = None,
    timeout_seconds: float = 120.0,
) -> list[Any]:
    """Call `fn(Rank(...), *args)` on ranks 0 .. world_size-1 of this machine.

    Args:
        world_size: the number of ranks.
        fn: a function at the top of a module that the ranks can import.
        args: they and the results are pickled; results with tensors should be small.
        device: "cpu" (gloo, one thread a rank) or "cuda" (NCCL, one GPU a rank).
        on_report: called here as `on_report(rank, value)` for every `Rank.report(value)`.
        timeout_seconds: of the process group, and of the agreement between the ranks.

    Returns:
        One result per rank.

    Raises:
        ValueError: this machine cannot run them.
        RankError: a rank raised or died; the others were killed.
    """
    check_ranks(world_size, device)
    with _Processes(world_size, fn, args, device, timeout_seconds) as processes:
        return processes.collect(on_report or (lambda rank, value: None))


def torchrun_environment(rank: int, world_size: int) -> dict[str, str]:
    """The variables that torchrun sets on one machine; some programs ask for them."""
    return {
        "TORCHELASTIC_RUN_ID": "nnscaler_ring",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


@dataclass(frozen=True)
class _Failure:
    """How a rank failed: it died, or `text` is its traceback."""

    rank: int
    died: bool
    text: str

    def error(self) -> RankError:
        return RankError(f"rank {self.rank} {'died: ' if self.died else 'raised:'}{self.text}")


@dataclass
class _Processes:
    """The processes of all ranks, from their start to their end."""

    world_size: int
    fn: Callable[..., Any]
    args: Sequence[Any]
    device: str
    timeout_seconds: float
    processes: list[BaseProcess] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)

    def __enter__(self) -> _Processes:
        self.folder = tempfile.TemporaryDirectory(prefix="nnscaler_ring-")
        try:
            self._start()
        except BaseException:
            self.__exit__(None)
            raise
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        folder = Path(self.folder.name)
        for rank in range(self.world_size):
            mine, theirs = context.Pipe()
            job = _Job(rank, self.world_size, self.device, folder, self.timeout_seconds)
            process = context.Process(
                target=_serve, args=(theirs, job, self.fn, self.args), daemon=True
            )
            process.start()
            theirs.close()  # so that a rank's death is seen as the end of its pipe
            self.processes.append(process)
            self.connections.append(mine)

    def collect(self, on_report: Callable[[int, Any], None]) -> list[Any]:
        """The results of all ranks; reports go to `on_report` as they come."""
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        results: dict[int, Any] = {}
        while waiting:
            failures = []
            for connection in multiprocessing.connection.wait(list(waiting)):
                assert isinstance(connection, Connection), connection
                rank = waiting[connection]
                match self._receive(rank):
                    case "report", value:
                        on_report(rank, value)
                    case "result", value:
                        results[rank] = value
                        del waiting[connection]
                    case _Failure() as failure:
                        failures.append(failure)
            if failures:
                # A death comes before the errors that it causes.
                raise min(failures, key=lambda failure: not failure.died).error()
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> Any:
        try:
            kind, value = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self.processes[rank]
            process.join(LEAVE_SECONDS)
            return _Failure(rank, True, f"exit code {process.exitcode} (-9: killed)")
        return _Failure(rank, False, f"\n{value}") if kind == "error" else (kind, value)

    def __exit__(self, kind: object, *rest: object) -> None:
        for connection in self.connections:
            connection.close()  # tells a rank that is done to leave
        for process in self.processes:
            if kind is None:
                process.join(LEAVE_SECONDS)
            process.kill()
            process.join()
        self.folder.cleanup()


@dataclass(frozen=True)
class _Job:
    """Where a rank belongs."""

    rank: int
    world_size: int
    device: str
    folder: Path
    timeout_seconds: float

    @contextmanager
    def group(self) -> Iterator[torch.device]:
        """Be a member of the default process group; gives the rank's device."""
        device = torch.device(self.device)
        if self.device == "cuda":
            device = torch.device("cuda", self.rank)
            torch.cuda.set_device(device)
        for _, interface in socket.if_nameindex():
            if interface in ("lo", "lo0"):
                # All ranks are here; the host's name may lead to an address that nobody reaches.
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        dist.init_process_group(
            BACKENDS[self.device],
            init_method=(self.folder / "store").as_uri(),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout_seconds),
        )
        set_agreement_timeout(range(self.world_size), self.timeout_seconds)
        yield device
        dist.destroy_process_group()


def _serve(connection: Connection, job: _Job, fn: Callable[..., Any], args: Sequence[Any]) -> None:
    """The life of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends the ranks
    threading.Thread(target=_end_with_parent, args=(job.folder,), daemon=True).start()
    torch.set_num_threads(1)

    def send(kind: str, value: Any) -> None:
        connection.send_bytes(pickle.dumps((kind, value)))

    try:
        with job.group() as device:
            rank = Rank(
                job.rank, job.world_size, device, lambda value: send("report", value), job.folder
            )
            send("result", fn(rank, *args))
            _wait_for_end(connection)
    except BaseException:
        send("error", traceback.format_exc().rstrip())
        _wait_for_end(connection)


def _wait_for_end(connection: Connection) -> None:
    try:
        connection.recv_bytes()
    except EOFError:
        return


def _end_with_parent(folder: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
