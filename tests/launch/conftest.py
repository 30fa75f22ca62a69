"""Runs on several processes of this machine: forked, so that torch is imported once, and ended by the clock."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import gpt_simple
from tests.tiny import TINY

SECONDS = 60.0

Work = Callable[[int], Any]
Ranks = Callable[..., list[Any]]


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """``ranks(n, work)``: what ``work(rank)`` gave in each of n processes; ``Failed: text`` for what it raised.

    None for a process that was killed or hung. Nothing outlives the call.
    """

    # Once, here, instead of in every process.
    for module in ("accelerate", "torch._dynamo", "torch.nn.parallel.distributed", "gpt_simple.job.train"):
        importlib.import_module(module)

    def run(count: int, work: Work, seconds: float = SECONDS) -> list[Any]:
        context = multiprocessing.get_context("fork")
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
        answers = [tmp_path / f"answer-{rank}.json" for rank in range(count)]
        for answer in answers:
            answer.unlink(missing_ok=True)
        processes = [
            context.Process(target=_live, args=(rank, shared if count > 1 else {}, work, answers[rank]))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        assert not hung, f"{len(hung)} of {count} processes were still there after {seconds:g} s"
        return [json.loads(answer.read_text()) if answer.exists() else None for answer in answers]

    return run


def _live(rank: int, shared: dict[str, str], work: Work, answer: Path) -> None:
    import torch
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    if shared:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=shared["WORLD_SIZE"])
    try:
        result = work(rank)
    except gpt_simple.GptSimpleError as error:
        result = {"error": type(error).__name__, "text": str(error), "silent": error.silent, "code": error.exit_code}
    except Exception as error:
        result = {"error": type(error).__name__, "text": str(error), "silent": False, "code": 1}
    answer.with_suffix(".tmp").write_text(json.dumps(result))
    answer.with_suffix(".tmp").replace(answer)
    # The group and its threads are not worth an orderly end.
    os._exit(0)


def tiny(directory: Path, *, plugins: Sequence[Any] = (), force: bool = False, **overrides: Any) -> Any:
    """The tiny run in this process; overrides with ``__`` for the dot."""
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    quiet = {"plugins.console.progress": "off", "training.output_dir": str(directory)}
    return gpt_simple.train(**TINY, overrides={**quiet, **values}, plugins=plugins, force=force)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
