"""What it costs the ranks of a group to agree on a new plan: requests, bytes and time by ranks.

Each rank is a thread with a client of its own of one TCPStore, and runs the comparison that ranks
run. `python -m benchmarks.agreement --clients 2 16 64 256 1024 --out FILE` adds a row per number.
"""

import argparse
import datetime
import json
import resource
import shlex
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnscaler_ring.core.ranks.comparison import GO, Comparison
from nnscaler_ring.core.ranks.store import patient_client

TEXT = str(list(range(1000)))


class Counted(dist.Store):
    """A store that counts what it is asked; `size`: of keys and values that travel, in bytes."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.inner, self.requests, self.size = store, 0, 0

    def _count(self, *parts: str) -> None:
        self.requests += 1
        self.size += sum(len(part) for part in parts)

    def add(self, key: str, amount: int) -> int:
        self._count(key, "8 bytes.")
        return self.inner.add(key, amount)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._count(key, expected, desired)
        return self.inner.compare_set(key, expected, desired)

    def get(self, key: str) -> bytes:
        value = self.inner.get(key)
        self._count(key, value.decode())
        return value

    def delete_key(self, key: str) -> bool:
        self._count(key)
        return self.inner.delete_key(key)

    def set_timeout(self, timeout: timedelta) -> None:
        self.inner.set_timeout(timeout)


def measure(clients: int, comparisons: int) -> dict[str, Any]:
    """The most requests and bytes of a rank, and the times from the first to the last rank."""
    minute = timedelta(seconds=60)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=minute)
    stores, patients = [], []
    for _ in range(clients):
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=minute)
        patient = patient_client(store)
        assert patient is not None
        stores.append(Counted(store))
        patients.append(Counted(patient))
    keys_before = server.num_keys()
    ready = threading.Barrier(clients)
    seconds = [[0.0] * clients for _ in range(comparisons)]

    def rank(n: int) -> None:
        for number in range(comparisons):
            comparison = Comparison(stores[n], patients[n], f"comparison/{number}/", clients)
            ready.wait()
            start = time.perf_counter()
            digest = comparison.digest(TEXT + str(number))
            verdict = comparison.arrive(digest) or comparison.wait(60.0)
            seconds[number][n] = time.perf_counter() - start
            assert verdict == GO, verdict
            comparison.leave(digest)

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    each = [a.requests + b.requests for a, b in zip(stores, patients, strict=True)]
    sizes = [a.size + b.size for a, b in zip(stores, patients, strict=True)]
    slowest = sorted(max(times) for times in seconds)
    return {
        "clients": clients,
        "comparisons": comparisons,
        "requests_per_rank_mean": round(sum(each) / clients / comparisons, 3),
        "requests_of_all_per_comparison": sum(each) / comparisons,
        "bytes_per_rank_mean": round(sum(sizes) / clients / comparisons, 1),
        "seconds_median": round(slowest[len(slowest) // 2], 5),
        "seconds_best": round(slowest[0], 5),
        "keys_left": server.num_keys() - keys_before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 16, 64, 256, 1024])
    parser.add_argument("--comparisons", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    # A rank has two connections, and the server is here too.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for clients in arguments.clients:
        row = {
            **measure(clients, arguments.comparisons),
            "command": "python -m benchmarks.agreement " + shlex.join(sys.argv[1:]),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }
        print(json.dumps(row))
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
