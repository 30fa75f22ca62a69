"""What a process did on the null GPU, from its log."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def read_log(path: Path) -> list[str]:
    """The events of a log, with the names of kernels as they are in C++."""
    text = path.read_bytes().decode("utf-8", "replace")
    shown = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return shown.stdout.splitlines()


def between(events: list[str], first: str, last: str) -> list[str]:
    """The events after one mark and before another."""
    return events[events.index(f"mark {first}") + 1 : events.index(f"mark {last}")]


def kind(event: str) -> str:
    """What is counted as one: ``triton``, ``aten``, ``cudnn``, ``gemm``, ``copy D>H``, ``sync stream``, ..."""
    words = event.split()
    if words[0] == "kernel":
        return words[1]
    if words[0] == "copy":
        return f"copy {words[2].replace('pinned', 'H')}"
    if words[0] in ("sync", "nccl"):
        return f"{words[0]} {words[1]}"
    return "gemm" if words[0] == "bmm" else words[0]


def count(events: Iterable[str]) -> dict[str, int]:
    """Events by kind, the most frequent first."""
    return dict(Counter(map(kind, events)).most_common())


LAUNCHES = ("triton", "aten", "cudnn", "gemm")


def launches(counted: dict[str, int]) -> int:
    """Kernels that were launched."""
    return sum(counted.get(name, 0) for name in LAUNCHES)


def waits(events: Iterable[str]) -> list[str]:
    """The events in which the host waits for the device: a synchronisation, or a copy to the host."""
    return [event for event in events if event.startswith(("sync", "copy sync")) or kind(event) == "copy D>H"]


def allocations(events: Iterable[str]) -> list[str]:
    """Requests to the driver, outside torch's cache of memory."""
    return [event for event in events if event.startswith(("malloc", "host_alloc"))]
