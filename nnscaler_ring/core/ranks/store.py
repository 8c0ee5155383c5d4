"""A group's store, asked with a bound: torch's own timeouts do not hold everywhere.

Note [Bounded answers]
    A read from a TCPStore whose host has stopped never returns, whatever its timeout. So whoever
    reads from a store on the path of a call does it in a thread that may be left behind. A client
    of a TCPStore answers one question at a time, so a long wait gets a client of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

STORE_SECONDS = 2.0
"""How long a store may take to answer beyond the time that ranks wait for each other."""

QUIET_SECONDS = 0.2
"""After how long a rank that waits for others says so."""


def answer_within(
    seconds: float,
    ask: Callable[[], T],
    wake: threading.Event | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> T:
    """What `ask` returns or raises: Note [Bounded answers].

    Args:
        wake: ends the wait when it is set; set here when the answer is there.
        meanwhile: called where the answer takes longer than `QUIET_SECONDS`.

    Raises:
        RuntimeError: no answer for that long, or until `wake` was set by somebody else.
    """
    answers: list[T] = []
    errors: list[BaseException] = []
    done = wake or threading.Event()

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=run, name="nnscaler_ring store", daemon=True).start()
    if meanwhile is not None and not done.wait(QUIET_SECONDS):
        threading.Thread(target=meanwhile, name="nnscaler_ring store", daemon=True).start()
    done.wait(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise RuntimeError(f"the store gave no answer for {seconds:g} s")
    return answers[0]


def peek(store: dist.Store, key: str) -> str | None:
    """The value of a key that nobody removes, or None where there is none; does not wait.

    Not by `compare_set` with two values that no key has: that wakes who waits for the key.
    """
    return store.get(key).decode() if store.check([key]) else None


def patient_client(store: dist.Store) -> dist.Store | None:
    """A client of its own for long waits in the server of a TCPStore; None: poll the store.

    A FileStore's own wait looks once a second, and torch before 2.5 cannot clone a client.
    """
    underlying = store
    while isinstance(underlying, dist.PrefixStore):
        underlying = underlying.underlying_store
    if isinstance(underlying, dist.TCPStore) and hasattr(store, "clone"):
        clone: dist.Store = store.clone()
        return clone
    return None


def wait_for_value(
    store: dist.Store, patient: dist.Store | None, key: str, seconds: float
) -> str | None:
    """The value of a key once there is one, or None after at most `seconds`."""
    if patient is None:
        return peek(store, key) if not wait_for_keys(store, [key], seconds) else None
    deadline = time.monotonic() + seconds
    patient.set_timeout(timedelta(seconds=max(seconds, 0.001)))
    try:
        return patient.get(key).decode()
    except RuntimeError:
        if time.monotonic() < deadline - 0.5 * seconds:
            raise  # too early for a timeout: the store is lost
        return None


def wait_for_keys(store: dist.Store, keys: Sequence[str], seconds: float) -> list[int]:
    """Indices of the keys that the store does not hold after at most `seconds`. Polls."""
    deadline = time.monotonic() + seconds
    missing = list(range(len(keys)))
    pause = 1e-4
    while True:
        missing = [n for n in missing if not store.check([keys[n]])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
