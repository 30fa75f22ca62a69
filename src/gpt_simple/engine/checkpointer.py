"""Checkpoints of a run: when one is written, by whom, and what happens if it cannot be.

The last checkpoint of a run must succeed. A periodic one that cannot be written is told and tried again, because a full
disk may be empty again tomorrow and hours of training are worth more than a save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from attrs import define, field, frozen

from gpt_simple.checkpoint.draft import Published
from gpt_simple.checkpoint.store import Store
from gpt_simple.engine.background import BackgroundWriter, NotFinite
from gpt_simple.engine.loss_monitor import all_finite
from gpt_simple.engine.time_budget import Walltime
from gpt_simple.engine.views import EngineRun
from gpt_simple.errors import CheckpointError
from gpt_simple.hooks.events import CheckpointSaved, CheckpointSaving
from gpt_simple.plugin_host.dispatch import Calls
from gpt_simple.run_dir.status import StatusFile

State = tuple[Mapping[str, Mapping[str, torch.Tensor]], Mapping[str, Any]]
"""Tensors and JSON documents of a checkpoint, by the stem of the file they go to."""


_TELL_SECONDS = 60.0


class RunDirOwner(Protocol):
    """The process's claim on its run directory. Only the main process writes there."""

    @property
    def status(self) -> StatusFile:
        """Where the run stands, for other commands to read."""

    def keep(self) -> None:
        """Recreate the directory if it was deleted. Raises CheckpointError if another process owns it now."""


@frozen
class Landing:
    """What became of a checkpoint that was written in the background: it is there, or not, or the run must halt."""

    done: Published | None = None
    halt: str = ""


@define(slots=False, eq=False)
class Saving:
    """Saves what ``state`` hands out. All processes call ``save`` and ``land`` together; the main one writes."""

    run: EngineRun
    calls: Calls
    model: torch.nn.Module
    store: Store
    state: Callable[[], State]
    walltime: Walltime | None
    owner: RunDirOwner
    again: str = field(default="", init=False)
    """Why a checkpoint should be written soon: the one before could not be."""
    _newest: int | None = field(default=None, init=False)
    _told: float = field(default=float("-inf"), init=False)
    _in_flight: tuple[int, str] | None = field(default=None, init=False)
    """Step of the checkpoint that is on its way, and the reason for it."""

    def __attrs_post_init__(self) -> None:
        # Buffers may hold an infinity, as a mask does.
        weights = self.model.state_dict().keys() - dict(self.model.named_buffers()).keys()
        self._writer = BackgroundWriter(self.store, weights)

    def save(self, reason: str, *, must_succeed: bool) -> bool:
        """Publish a checkpoint of this step, unless there is one. CheckpointError only if it ``must_succeed``.

        False if there is nothing worth saving because the weights are not finite; the last good one stays. In the
        background that is found out later, and halts the run when it lands.
        """
        run, calls, started = self.run, self.calls, time.perf_counter()
        self.land(wait=True)
        if self._newest == run.step:
            return True
        in_background = run.config.training.background_save and not must_succeed
        if not in_background and not run.world.main_only(lambda: all_finite(self.model.parameters())):
            return False
        if calls.on_checkpoint_saving is not None:
            with run.comm.during("on_checkpoint_saving"):
                calls.on_checkpoint_saving(run, CheckpointSaving(run.step, reason))
        if in_background:
            run.world.main_only(self._begin)
            self._in_flight = run.step, reason
            return True
        self._published(run.world.main_only(lambda: self._publish(must_succeed)), reason)
        if self.walltime is not None:
            self.walltime.saved(time.perf_counter() - started)
        return True

    def land(self, *, wait: bool) -> None:
        """Tell of a checkpoint that was written in the background, as soon as it is durable."""
        if self._in_flight is None:
            return
        step, reason = self._in_flight
        landing = self.run.world.main_only(lambda: self._landed(step, wait))
        if landing is None:
            return
        self._in_flight = None
        if landing.halt:
            self.run.control.halt(landing.halt)
            return
        self._published(landing.done, reason)
        if self.walltime is not None and landing.done is not None:
            # The last one of the run may have to wait for one that is on its way.
            self.walltime.saved(2 * landing.done.seconds)

    def not_finite(self, step: int) -> str:
        """Why the run halts when the weights after ``step`` are not finite."""
        good = self.store.list()
        kept = f"the last good checkpoint is {good[-1].path}" if good else "there is no earlier checkpoint"
        return f"weights are not finite after step {step}; nothing was written, {kept}"

    def close(self) -> None:
        """Wait for a checkpoint that is on its way, and for the files of deleted ones to be gone."""
        self._writer.close()
        self.store.settle()

    def _begin(self) -> None:
        self.owner.keep()
        self._writer.begin(self.run.step, *self.state())

    def _publish(self, must_succeed: bool) -> Published | None:
        self.owner.keep()
        try:
            tensors, documents = self.state()
            return self.store.publish(self.run.step, tensors=tensors, documents=documents)
        except CheckpointError as error:
            if must_succeed:
                raise
            self._tell(error)
            return None

    def _landed(self, step: int, wait: bool) -> Landing | None:
        """What became of the checkpoint of ``step``; None while it is on its way."""
        try:
            done = self._writer.landed(wait=wait)
            return None if done is None else Landing(done)
        except NotFinite:
            return Landing(halt=self.not_finite(step))
        except CheckpointError as error:
            self._tell(error)
            return Landing()

    def _tell(self, error: CheckpointError) -> None:
        # It is tried again at every logging point: those who read need not be told as often.
        if (now := time.monotonic()) - self._told >= _TELL_SECONDS:
            self._told = now
            self.run.log.error(f"{error}; training goes on, and it is tried again", name="checkpoint_failed")

    def _published(self, done: Published | None, reason: str) -> None:
        # Tried again when the log is due: until then somebody may have made room.
        self.again = "" if done else "the one before could not be written"
        if done is None:
            return
        self._told = float("-inf")
        self._newest = done.step
        if self.calls.on_checkpoint_saved is not None:
            event = CheckpointSaved(done.step, done.path, done.seconds, done.bytes, reason)
            self.calls.on_checkpoint_saved(self.run, event)
