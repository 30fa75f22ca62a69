"""When a checkpoint of a run is written, and what happens if it cannot be.

The last checkpoint of a run must succeed. A periodic one that cannot be written is reported and tried again: the disk
may have room again later, and hours of training are worth more than a save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from attrs import define, field, frozen

from gpt_simple.checkpoint.draft import Published
from gpt_simple.checkpoint.sharded import local_part
from gpt_simple.checkpoint.store import Store
from gpt_simple.engine.background import BackgroundWriter, NotFinite
from gpt_simple.engine.loss_monitor import all_finite
from gpt_simple.engine.memory import state_bytes
from gpt_simple.engine.mirror import Mirror
from gpt_simple.engine.time_budget import TimeBudget
from gpt_simple.engine.views import RunView
from gpt_simple.errors import CheckpointError
from gpt_simple.hardware import free_memory
from gpt_simple.hooks.events import CheckpointSaved, CheckpointSaving
from gpt_simple.plugin_host.dispatch import Calls
from gpt_simple.run_dir.status import StatusFile

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
Snapshot = tuple[Tensors, Mapping[str, Any]]
"""Tensors and JSON documents of a checkpoint, by the stem of the file they go to."""

Collect = Callable[[], Snapshot]
"""Returns the content of a checkpoint on the main rank. All ranks call it together: each may have a part of a tensor,
and what is whole then is a copy in host memory."""

_REPEAT_SECONDS = 60.0
"""How often a persistent failure is reported again."""


class RunDirOwner(Protocol):
    """This rank's claim on the run directory. Only the main rank writes there."""

    store: Store
    status: StatusFile
    writer: BackgroundWriter
    mirror: Mirror | None

    def keep(self) -> None:
        """Recreate the directory if it was deleted. Raises CheckpointError if another process owns it now."""

    def record_val_loss(self, step: int, loss: float) -> None:
        """Keep the validation loss of ``step`` durably: a checkpoint is saved before it is evaluated."""


@frozen
class SaveResult:
    """The outcome of a background save. ``written``: it is durable. If neither is set, it failed and is tried again."""

    written: Published | None = None
    not_finite: str = ""
    """Why nothing was written and the run must halt: weights are not finite."""


@define(eq=False)
class Checkpointer:
    """Saves what ``collect`` returns. All ranks call ``save`` and ``poll`` together; the main one writes."""

    run: RunView
    calls: Calls
    run_dir: RunDirOwner
    collect: Collect
    time_budget: TimeBudget | None
    retry_due: bool = field(default=False, init=False)
    """Whether the newest save failed and should be tried again soon."""
    _fits: bool | None = field(default=None, init=False)
    _newest: int | None = field(default=None, init=False)
    _write_seconds: float = field(default=0.0, init=False)
    _outdated: bool = field(default=False, init=False)
    _reported: float = field(default=float("-inf"), init=False)
    _pending: tuple[int, str] | None = field(default=None, init=False)
    """Step and reason of the save that is running in the background."""
    _evaluated: tuple[int, float] | None = field(default=None, init=False)
    """The step that was evaluated last, and its validation loss."""

    def save(self, reason: str, *, blocking: bool, started: float) -> str:
        """Save this step, unless it is saved already as it is now. Raises CheckpointError only if ``blocking``.

        ``started``, of ``time.perf_counter``: when the host was done with the step, before it waited for the device.
        Returns why the run must halt: weights are not finite, so nothing is written and the last good checkpoint stays.
        After a background save ``poll`` requests the halt.
        """
        run, dist = self.run, self.run.dist
        self.poll(wait=True)
        if self._newest == run.step and not self._outdated:
            return ""
        self._outdated = False
        in_background = not blocking and self._has_background()
        if not in_background and not self._all_finite():
            return self._not_finite(run.step)
        if self.calls.on_checkpoint_saving is not None:
            with run.comm.during("on_checkpoint_saving"):
                self.calls.on_checkpoint_saving(run, CheckpointSaving(run.step, reason))
        snapshot = self.collect()
        if in_background:
            dist.on_main(lambda: self._begin(*snapshot))
            self._pending = run.step, reason
            return ""
        self._finish(dist.on_main(lambda: self._write(*snapshot, must_succeed=blocking)), reason)
        if self.time_budget is not None:
            self.time_budget.record_save(time.perf_counter() - started)
        return ""

    def outdate(self) -> None:
        """Let the next ``save`` write this step again if it is saved already: its state has changed since."""
        self._outdated = True

    def record_val_loss(self, loss: float) -> None:
        """Keep the validation loss of this step, durably and for the event of its checkpoint."""
        self._evaluated = self.run.step, loss
        self.run_dir.record_val_loss(self.run.step, loss)

    def poll(self, *, wait: bool) -> None:
        """Report a background save if it has ended; ``wait`` until it has. Also report copies in the store."""
        if (mirror := self.run_dir.mirror) is not None:
            for seconds in mirror.report(self.run.log):
                if self.time_budget is not None:
                    self.time_budget.record_save(self._write_seconds + seconds)  # the last save waits for its copy
        if self._pending is None:
            return
        step, reason = self._pending
        result = self.run.dist.on_main(lambda: self._background_result(step, wait))
        if result is None:
            return
        self._pending = None
        if result.not_finite:
            self.run.control.halt(result.not_finite)
            return
        self._finish(result.written, reason)
        if self.time_budget is not None and result.written is not None:
            # The last save of the run may have to wait for one that is still running.
            self.time_budget.record_save(2 * result.written.seconds)

    def _has_background(self) -> bool:
        """Whether saves are made in the background. Unless the user decides, the copy must fit into half of what the
        main process's host has free: plugins and the loader take some, too."""
        training = self.run.config.training
        wanted = training.saves_in_background(self.run.device.type)
        if training.background_save == "auto" and wanted and self._fits is None:
            self._fits = self.run.dist.on_main(self._copy_fits)
        return wanted and self._fits is not False

    def _copy_fits(self) -> bool:
        free, needed = free_memory(), state_bytes(self.run.raw, self.run.optimizer)
        if free is None or 2 * needed <= free:
            return True
        self.run.log.info(
            f"checkpoints are not written in the background: a copy of the state takes {needed / 2**30:.1f} GiB, and"
            f" {free / 2**30:.1f} GiB of host memory are free (training.background_save = true does it all the same)",
            name="background_save_off",
        )
        return False

    def _not_finite(self, step: int) -> str:
        good = self.run_dir.store.list()
        kept = f"the last good checkpoint is {good[-1].path}" if good else "there is no earlier checkpoint"
        return f"weights are not finite after step {step}; nothing was written, {kept}"

    def _all_finite(self) -> bool:
        """Whether all weights are finite, of which each rank may have a part."""
        dist = self.run.dist
        if not dist.shards:
            return dist.on_main(lambda: all_finite(self.run.raw.parameters()))
        return not any(dist.all_reduce_max([not all_finite(map(local_part, self.run.raw.parameters()))]))

    def _begin(self, tensors: Tensors, documents: Mapping[str, Any]) -> None:
        self.run_dir.keep()
        # A buffer may hold an infinity, as a mask does.
        model = self.run.guarded
        weights = model.state_dict().keys() - dict(model.named_buffers()).keys()
        self.run_dir.writer.begin(
            self.run.step, tensors, documents, must_be_finite=weights, are_copies=self.run.dist.shards
        )

    def _write(self, tensors: Tensors, documents: Mapping[str, Any], *, must_succeed: bool) -> Published | None:
        self.run_dir.keep()
        try:
            return self.run_dir.store.publish(self.run.step, tensors=tensors, documents=documents)
        except CheckpointError as error:
            if must_succeed:
                raise
            self._report(error)
            return None

    def _background_result(self, step: int, wait: bool) -> SaveResult | None:
        try:
            written = self.run_dir.writer.result(wait=wait)
            return None if written is None else SaveResult(written)
        except NotFinite:
            return SaveResult(not_finite=self._not_finite(step))
        except CheckpointError as error:
            self._report(error)
            return SaveResult()

    def _report(self, error: CheckpointError) -> None:
        # It is tried again at every logging point, but not reported as often.
        if (now := time.monotonic()) - self._reported >= _REPEAT_SECONDS:
            self._reported = now
            self.run.log.error(f"{error}; training goes on, and it is tried again", name="checkpoint_failed")

    def _finish(self, written: Published | None, reason: str) -> None:
        self.retry_due = written is None
        if written is None:
            return
        self._reported = float("-inf")
        self._newest, self._write_seconds = written.step, written.seconds
        if self.run_dir.mirror is not None:
            self.run_dir.mirror.begin(written.path)
        if self.calls.on_checkpoint_saved is not None:
            step, loss = self._evaluated or (None, None)
            event = CheckpointSaved(
                written.step,
                written.path,
                written.seconds,
                written.bytes,
                reason,
                val_loss=loss if step == written.step else None,
            )
            self.calls.on_checkpoint_saved(self.run, event)
