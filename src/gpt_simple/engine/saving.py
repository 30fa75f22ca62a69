"""Checkpoints of a run: when one is written, by whom, and what happens if it cannot be.

The last checkpoint of a run must succeed. A periodic one that cannot be written is told and tried again, because a full
disk may be empty again tomorrow and hours of training are worth more than a save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import define, field

from gpt_simple.checkpoint.draft import Published
from gpt_simple.checkpoint.store import Store
from gpt_simple.engine.background import BackgroundWriter
from gpt_simple.engine.numerics import all_finite
from gpt_simple.engine.run import EngineRun
from gpt_simple.engine.stopping import Walltime
from gpt_simple.errors import CheckpointError
from gpt_simple.hooks.dispatch import Calls
from gpt_simple.hooks.events import CheckpointSaved, CheckpointSaving

State = tuple[Mapping[str, Mapping[str, torch.Tensor]], Mapping[str, Any]]
"""Tensors and JSON documents of a checkpoint, by the stem of the file they go to."""


@define(slots=False, eq=False)
class Saving:
    """Saves what ``state`` hands out. All processes call ``save`` and ``land`` together; the main one writes."""

    run: EngineRun
    calls: Calls
    model: torch.nn.Module
    store: Store
    state: Callable[[], State]
    walltime: Walltime | None
    again: str = field(default="", init=False)
    """Why a checkpoint should be written soon: the one before could not be."""
    _newest: int | None = field(default=None, init=False)
    _in_flight: str = field(default="", init=False)

    def __attrs_post_init__(self) -> None:
        self._writer = BackgroundWriter(self.store)

    def save(self, reason: str, *, must_succeed: bool) -> bool:
        """Publish a checkpoint of this step, unless there is one. CheckpointError only if it ``must_succeed``.

        False if there is nothing worth saving because the weights are not finite; the last good one stays.
        """
        run, calls, started = self.run, self.calls, time.perf_counter()
        self.land(wait=True)
        if self._newest == run.step:
            return True
        if not run.world.main_only(lambda: all_finite(self.model)):
            return False
        if calls.on_checkpoint_saving is not None:
            with run.comm.during("on_checkpoint_saving"):
                calls.on_checkpoint_saving(run, CheckpointSaving(run.step, reason))
        in_background = run.config.training.background_save and not must_succeed
        done = run.world.main_only(lambda: self._publish(must_succeed, in_background))
        if in_background:
            self._in_flight = reason
            return True
        self._published(done, reason)
        if self.walltime is not None:
            self.walltime.saved(time.perf_counter() - started)
        return True

    def land(self, *, wait: bool) -> None:
        """Tell of a checkpoint that was written in the background, as soon as it is durable."""
        if not self._in_flight:
            return
        over, done = self.run.world.main_only(lambda: self._landed(wait))
        if not over:
            return
        reason, self._in_flight = self._in_flight, ""
        self._published(done, reason)
        if self.walltime is not None and done is not None:
            # The last one of the run may have to wait for one that is on its way.
            self.walltime.saved(2 * done.seconds)

    def not_finite(self) -> str:
        """Why the run halts when ``save`` returned False."""
        good = self.store.list()
        kept = f"the last good checkpoint is {good[-1].path}" if good else "there is no earlier checkpoint"
        return f"weights are not finite after step {self.run.step}; nothing was written, {kept}"

    def close(self) -> None:
        """Wait for a checkpoint that is on its way."""
        self._writer.close()

    def _publish(self, must_succeed: bool, in_background: bool) -> Published | None:
        run = self.run
        if not run.output_dir.exists():
            run.log.error(
                f"{run.output_dir} is gone, with the earlier checkpoints: it is made anew", name="output_gone"
            )
        try:
            tensors, documents = self.state()
            if in_background:
                self._writer.begin(run.step, tensors, documents)
                return None
            return self.store.publish(run.step, tensors=tensors, documents=documents)
        except CheckpointError as error:
            if must_succeed:
                raise
            run.log.error(f"{error}; training goes on", name="checkpoint_failed")
            return None

    def _landed(self, wait: bool) -> tuple[bool, Published | None]:
        """Whether nothing is on its way any more, and what came of it."""
        try:
            done = self._writer.landed(wait=wait)
            return done is not None, done
        except CheckpointError as error:
            self.run.log.error(f"{error}; training goes on", name="checkpoint_failed")
            return True, None

    def _published(self, done: Published | None, reason: str) -> None:
        # Tried again when the log is due: until then somebody may have made room.
        self.again = "" if done else "the one before could not be written"
        if done is None:
            return
        self._newest = done.step
        if self.calls.on_checkpoint_saved is not None:
            event = CheckpointSaved(done.step, done.path, done.seconds, done.bytes, reason)
            self.calls.on_checkpoint_saved(self.run, event)
