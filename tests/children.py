"""Whole runs in forked processes: torch is loaded already, so one costs little more than its steps."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from gpt_simple import Plugin, hookimpl
from gpt_simple.checkpoint.draft import Draft
from gpt_simple.errors import GptSimpleError
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.status import Status, read_status
from tests.checkpoint.injection import outcome, start
from tests.tiny import TinyRun


class Everywhere(Plugin[Any]):
    """A plugin of a test: whatever goes wrong in it ends the run."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)


class At(Everywhere):
    """Does ``work(run)`` in ``hook`` at ``step``."""

    def __init__(self, hook: str, step: int, work: Callable[[Any], object]) -> None:
        super().__init__()
        self.hook, self.step, self.work = hook, step, work

    def _meet(self, hook: str, run: Any, step: int) -> None:
        if (hook, step) == (self.hook, self.step):
            self.work(run)

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self._meet("on_run_start", run, event.step)

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        self._meet("on_model_built", run, 0)

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        self._meet("on_step_start", run, event.step)

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        self._meet("on_gradients", run, event.step)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self._meet("on_step_end", run, event.step)

    @hookimpl
    def on_checkpoint_saving(self, run: Any, event: Any) -> None:
        self._meet("on_checkpoint_saving", run, event.step)

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        self._meet("on_eval_end", run, event.step)


def stops_at(step: int) -> At:
    """A plugin that asks for a stop at the end of ``step``."""
    return At("on_step_end", step, lambda run: run.control.stop("enough"))


class At2(At):
    """A second one: plugins need classes of different names."""


@frozen
class Ended:
    """How a run in a process of its own ended: its exit code, or the signal that ended it, negative."""

    code: int
    status: Status
    steps: list[int]
    """Steps of its checkpoints."""


@pytest.fixture
def apart(tiny: TinyRun, tmp_path: Path) -> Callable[..., Ended]:
    """The tiny run in a forked process. ``meanwhile(pid)`` is called while it runs."""

    def run(
        out: str = "run",
        *,
        plugins: Sequence[Any] = (),
        meanwhile: Callable[[int], object] = lambda pid: None,
        **overrides: Any,
    ) -> Ended:
        def work() -> None:
            signal.alarm(120)
            try:
                code = int(tiny(out, plugins=plugins, **overrides).exit_code)
            except GptSimpleError as error:
                print(error, flush=True)
                code = int(error.exit_code)
            os._exit(code)

        pid = start(work)
        try:
            meanwhile(pid)
        finally:
            code = outcome(pid)
        directory = RunDir(tmp_path / out)
        steps = [json.loads(p.read_text())["step"] for p in directory.checkpoints.glob("step-*/MANIFEST.json")]
        return Ended(code, read_status(directory), sorted(steps))

    return run


def kill_self(run: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_self(run: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def full_disk_until(step: int, monkeypatch: pytest.MonkeyPatch) -> At:
    """Let writing a checkpoint fail for want of room, until this plugin is called at the end of ``step``."""
    real, full = Draft.add_tensors, [True]

    def add_tensors(self: Draft, stem: str, tensors: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, stem, tensors)

    def make_room(run: Any) -> None:
        full[0] = False

    monkeypatch.setattr(Draft, "add_tensors", add_tensors)
    return At("on_step_end", step, make_room)
