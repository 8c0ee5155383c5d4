"""Worker processes that are measured: spawned once, alive between runs, blocked while idle."""

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnscaler_ring import set_agreement_timeout

ANSWER_SECONDS = 1800.0  # one run of the longest case, on a busy machine
GROUP_SECONDS = 600.0


class WorkerError(Exception):
    """A worker raised or died; `cause` is what it raised first, in one line."""

    def __init__(self, cause: str, details: str) -> None:
        super().__init__(details)
        self.cause = cause


@dataclass
class Worker:
    """What a function that runs in a worker gets first: who it is, and the runs it has prepared."""

    rank: int
    world_size: int
    prepared: dict[str, Callable[[], Sequence[torch.Tensor]]] = field(default_factory=dict)


class Processes:
    """`size` workers of `threads` threads each; several are the ranks of one gloo group."""

    def __init__(
        self, size: int, *, threads: int = 1, environment: Mapping[str, str] | None = None
    ) -> None:
        self.size = size
        self.threads = threads
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        with _environment({**_defaults(threads), **(environment or {})}):
            for rank in range(size):
                self._start(rank)
        try:
            self._collect()
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(worker, *args)` in every worker at once; their results by rank."""
        request = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(request)
        return self._collect()

    @property
    def pids(self) -> list[int]:
        """The process ids."""
        return [process.pid for process in self._processes if process.pid is not None]

    def close(self) -> None:
        """End the workers, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, rank: int) -> None:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, rank, self.size, self.threads, self._folder), daemon=True
        )
        process.start()
        theirs.close()  # so that a worker's death is seen as the end of its pipe
        self._processes.append(process)
        self._connections.append(mine)

    def _collect(self) -> list[Any]:
        """One answer of each worker; raises at the first that fails, others may wait for it."""
        deadline = time.monotonic() + ANSWER_SECONDS
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            silent = [c for rank, c in enumerate(self._connections) if rank not in answers]
            ready = wait(silent, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerError("no answer", f"a worker gave none in {ANSWER_SECONDS:g} s")
            for rank, connection in enumerate(self._connections):
                if connection in ready:
                    answers[rank] = self._receive(rank, connection)
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: int, connection: Connection) -> Any:
        try:
            value, cause, details = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise WorkerError("died", f"worker {rank} of {self.size} died") from None
        if cause:
            raise WorkerError(cause, f"worker {rank} of {self.size}:\n{details}")
        return value


def prepare(worker: Worker, name: str, make: Callable[..., Any], *args: Any) -> None:
    """Make a run from `make(worker, *args)` and keep it under a name."""
    worker.prepared[name] = make(worker, *args)


def run_once(worker: Worker, name: str) -> list[torch.Tensor]:
    """The results of a prepared run."""
    return [x.detach() for x in worker.prepared[name]()]


def time_once(worker: Worker, name: str) -> tuple[float, float]:
    """When a prepared run began and ended here, in seconds of the clock that processes share."""
    run = worker.prepared[name]
    gc.collect()
    if worker.world_size > 1:
        dist.barrier()
    start = time.perf_counter()
    run()
    return start, time.perf_counter()


def forget(worker: Worker) -> None:
    """Drop all prepared runs and their tensors."""
    worker.prepared.clear()


def _serve(connection: Connection, rank: int, size: int, threads: int, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends the workers
    torch.set_num_threads(threads)
    worker = Worker(rank, size)
    connection.send_bytes(_attempt(lambda: _join(rank, size, folder)))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # an ordered shutdown of the group could wait for a rank that is gone

        def call(request: bytes = request) -> Any:
            function, args = pickle.loads(request)
            return function(worker, *args)

        connection.send_bytes(_attempt(call))


def _join(rank: int, size: int, folder: Path) -> None:
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        set_agreement_timeout(range(size), GROUP_SECONDS)  # ranks of a busy machine drift apart


def _attempt(call: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((call(), "", ""))
    except BaseException as error:
        return pickle.dumps((None, _first_cause(error), traceback.format_exc()))


def _first_cause(error: BaseException) -> str:
    # A context manager that fails while it leaves hides the error that made it leave.
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())


def _defaults(threads: int) -> dict[str, str]:
    """What a worker must find before it imports torch; the profiler would log to stderr."""
    return {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", "KINETO_LOG_LEVEL": "99"}


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
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
