"""Train on several processes with a time limit, which finds a barrier that only one of them reaches.

The processes are forked, so plugins may be defined in a test. They run on the CPU, so no device is needed.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from gpt_simple.plugin_host.loading import PassedPlugin


class Hang(AssertionError):
    """Processes were still waiting at the time limit. The message has the stack of each."""


@frozen
class RankOutcome:
    """The result of one process: its error (empty: none), the hooks it called, and the sha256 of its weights."""

    rank: int
    error: str
    hooks: tuple[str, ...]
    weights: str


def train_on_ranks(
    *plugins: PassedPlugin,
    ranks: int = 2,
    timeout: float = 60.0,
    output_dir: Path | str | None = None,
    max_steps: int = 3,
    overrides: Mapping[str, Any] | None = None,
) -> list[RankOutcome]:
    """Train the tiny model on ``ranks`` processes; the failure of one is in its outcome.

    After one process fails, the others have five seconds to end, as under a launcher. Raises Hang if none failed and
    one is still running after ``timeout`` seconds.
    """
    _import_what_a_run_needs()
    with tempfile.TemporaryDirectory(prefix="gpt-simple-ranks-") as scratch:
        folder = Path(scratch)
        context = multiprocessing.get_context("fork")
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            # A forked process lacks its parent's worker threads and would wait for them in its first kernel. Without
            # this variable Accelerate sets their number.
            "OMP_NUM_THREADS": "1",
        }
        options = {"output_dir": output_dir or folder / "run", "max_steps": max_steps, "overrides": overrides}
        processes = [
            context.Process(target=_one_rank, args=(rank, environment, folder, timeout, plugins, options), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        _wait(processes, timeout)
        # Checked before any process is killed, because that makes the others fail.
        hung = any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        if hung:
            stacks = "\n".join(f"rank {rank}:\n{_read(folder / f'{rank}.stack')}" for rank in range(ranks))
            raise Hang(f"{ranks} processes did not finish in {timeout:g} s\n{stacks}")
        return [_outcome(rank, folder) for rank in range(ranks)]


def _import_what_a_run_needs() -> None:
    """Import once, before the fork, instead of in every process and within its time limit."""
    for module in ("accelerate", "torch._dynamo", "torch.nn.parallel.distributed", "gpt_simple.testing.tiny"):
        importlib.import_module(module)


def _wait(processes: Sequence[Any], timeout: float) -> None:
    """Wait until all processes have ended, the time is up, or the grace after a failure is over."""
    deadline = time.monotonic() + timeout
    grace = None
    while any(process.is_alive() for process in processes):
        now = time.monotonic()
        if grace is None and any(process.exitcode for process in processes):
            grace = now + 5.0
        if now > deadline or (grace is not None and now > grace):
            return
        time.sleep(0.02)


def _one_rank(
    rank: int,
    environment: Mapping[str, str],
    folder: Path,
    timeout: float,
    plugins: Sequence[PassedPlugin],
    options: Mapping[str, Any],
) -> None:
    """The main function of one process; it never returns into the test that forked it."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    code = 1
    with open(folder / f"{rank}.stack", "w") as stack:
        faulthandler.dump_traceback_later(max(0.5, timeout - 1.0), file=stack)
        try:
            code = _train(rank, folder, plugins, options)
        finally:
            faulthandler.cancel_dump_traceback_later()
            os._exit(code)


def _train(rank: int, folder: Path, plugins: Sequence[PassedPlugin], options: Mapping[str, Any]) -> int:
    import torch
    from accelerate.state import AcceleratorState

    from gpt_simple.testing.recorder import Recorder
    from gpt_simple.testing.tiny import train

    # The parent had more threads, and its Accelerate another process group.
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    recorder, error = Recorder(), ""
    try:
        train(*plugins, recorder=recorder, **options)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in recorder.weights.values()))
    (folder / f"{rank}.json").write_text(json.dumps([error, recorder.hooks(), weights.hexdigest()]))
    return 1 if error else 0


def _outcome(rank: int, folder: Path) -> RankOutcome:
    error, hooks, weights = json.loads(_read(folder / f"{rank}.json") or '["was ended while it was waiting", [], ""]')
    return RankOutcome(rank, error, tuple(hooks), weights)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
