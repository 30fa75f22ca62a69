"""The run directory: claimed before anything in it changes, and released when the run has ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attrs import define

from gpt_simple.checkpoint.store import Store
from gpt_simple.data.dataset import Dataset
from gpt_simple.engine.background import BackgroundWriter
from gpt_simple.engine.mirror import Mirror
from gpt_simple.engine.resume import ResumePlan
from gpt_simple.engine.state import TrainState
from gpt_simple.engine.stop_signals import StopNow
from gpt_simple.engine.views import EngineLog
from gpt_simple.errors import CheckpointError, ConfigError, ExitCode, describe, system_errors
from gpt_simple.hooks.batch import Tokenizer
from gpt_simple.job.job import Job
from gpt_simple.job.memory_advice import advised_failures
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord, new_id
from gpt_simple.run_dir.lock import RunLock
from gpt_simple.run_dir.status import StatusFile
from gpt_simple.run_dir.stop_request import take_stop_request


class LockLost(CheckpointError):
    """The run directory was deleted, and another process owns the one that is there now."""


@define(eq=False)
class ClaimedRunDir:
    """All that writes into the run directory. Only the main rank holds the lock and writes."""

    paths: RunDir
    store: Store
    status: StatusFile
    writer: BackgroundWriter
    record: RunRecord
    mirror: Mirror | None
    _lock: RunLock
    _tokenizer: Tokenizer
    _log: EngineLog
    _discards: bool
    """Whether the run that is there gives way to this one."""

    @property
    def run_id(self) -> str:
        """8 lower-case letters and digits, kept through every resume in the directory."""
        return self.record.run_id

    def record_launch(self, info: Mapping[str, Any], step: int, plan: ResumePlan) -> None:
        """Add this launch to run.json: what runs now and from which checkpoint.

        An earlier run is discarded only here, when everything is built: a build that fails leaves it as it was.
        """
        with system_errors(CheckpointError, self.paths.root):
            if self._discards:
                if self.mirror is not None:
                    self.mirror.discard()
                self.paths.remove_run_files()
                self.status.update(force=True)
            self._tokenizer.save(self.paths.tokenizer)
            self.record.launched(info, step=step, resumed_from=plan.source)
        if self.mirror is not None:
            self.mirror.begin_missing()

    def record_val_loss(self, step: int, loss: float) -> None:
        """Record the validation loss of ``step`` durably. A full disk does not end the run: it is logged."""
        if self._lock.is_held():
            self.record.evaluated(step, loss, [found.step for found in self.store.list()])
            self._write_record()

    def record_value(self, key: str, value: Any) -> None:
        """Record a JSON value of a plugin durably. A full disk does not end the run: it is logged."""
        if key in self.record.recorded and self.record.recorded[key] == value:
            return
        self.record.recorded[key] = value
        self._write_record()

    def keep(self) -> None:
        """If the directory was deleted, recreate it with all that a later launch and other commands need.

        Raises LockLost if another process owns the directory now. Does nothing if nothing can be written: the next
        checkpoint reports that.
        """
        if not self._lock.is_lost():
            return
        try:
            self.paths.create()
        except ConfigError:
            return
        try:
            self._lock.renew()
        except CheckpointError as error:
            raise LockLost(f"{self.paths.root} was deleted under the run, and another began there: {error}") from error
        try:
            self._tokenizer.save(self.paths.tokenizer)
            if self.record.lineage:
                self.record.write()
        except OSError as error:
            self._log.error(f"{self.paths.root} cannot be written: {error.strerror}", name="output_failed")
        self.status.update(force=True)
        message = f"{self.paths.root} is gone, with the earlier checkpoints: it is made anew"
        self._log.error(message, name="output_gone")

    def _write_record(self) -> None:
        if self._lock.is_held():
            try:
                self.record.write()
            except OSError as error:
                self._log.error(f"{self.paths.run_json} was not written: {error.strerror}", name="output_failed")

    def close_mirror(self) -> None:
        """End what copies checkpoints into the store; after an error, wait for them first."""
        if self.mirror is not None:
            self.mirror.close(self._log, owns_run=self._lock.is_held())

    def take_stop_request(self) -> str:
        """The reason of a stop request in the directory, or an empty string. Also keeps the directory."""
        self.keep()
        return take_stop_request(self.paths) if self._lock.is_held() else ""


@contextmanager
def claim_run_dir(job: Job, data: Dataset, plan: ResumePlan) -> Iterator[ClaimedRunDir]:
    """Own the run directory. On the way out an error is written into the status, threads are joined, the lock is freed.

    Raises CheckpointError, and leaves another process's run unchanged, if it owns the directory.
    """
    log, paths, store, state = job.plugins.log, job.run_dir, plan.found.store, job.state
    lock = RunLock(paths, log.info)
    status = StatusFile(paths, may_write=lock.is_held)
    step = int(plan.found.state.get("step", 0))

    def record_forced_exit() -> None:
        reason = "second Ctrl-C: the steps since the last checkpoint are lost"
        status.update(state="stopped", step=state.step, reason=reason, force=True)

    with job.signals.on_forced_exit(record_forced_exit):
        try:
            record = job.dist.on_main(lambda: _acquire(job, plan, lock))
            claimed = ClaimedRunDir(
                paths,
                store,
                status,
                BackgroundWriter(store),
                record,
                plan.found.mirror,
                lock,
                data.tokenizer,
                log,
                job.force,
            )
            with (
                _status_of_errors(claimed, state, step),
                job.dist.explained_failures(lambda: state.step),
                job.spec.located_errors(),  # the status and the other ranks show no secrets
                advised_failures(job.spec, job.dist.device, job.runtime.checkpointing),
            ):
                status.update(state="running", step=step, max_steps=job.config.training.max_steps, force=True)
                yield claimed
        finally:
            lock.release()


def _acquire(job: Job, plan: ResumePlan, lock: RunLock) -> RunRecord:
    """Lock the directory, and only then change anything in it."""
    with system_errors(CheckpointError, job.run_dir.root):
        return _locked(job, plan, lock)


def _locked(job: Job, plan: ResumePlan, lock: RunLock) -> RunRecord:
    paths, found, store, log = job.run_dir, plan.found, plan.found.store, job.plugins.log
    paths.create()
    lock.acquire()
    # A stop request that is there was meant for the previous owner.
    paths.stop_request.unlink(missing_ok=True)
    store.sweep()
    if job.force:
        return RunRecord(paths, new_id())
    if list(found.seen) != [checkpoint.path for checkpoint in store.list()]:
        raise CheckpointError(f"another run has written to {paths.root} just now: start again to go on from it")
    for path, reason in found.skipped:
        moved = store.quarantine(path, reason)
        where = "stays where it is" if moved == path else f"is now {moved}"
        log.warning(f"{reason}; it {where}, and the one before it is used", name="checkpoint_skipped")
    if plan.source is not None and plan.source.parent == paths.checkpoints and not paths.run_json.exists():
        log.warning(f"{paths.run_json} is gone: the run goes on under a new id", name="record_gone")
    return RunRecord.load(paths)


@contextmanager
def _status_of_errors(claimed: ClaimedRunDir, state: TrainState, begun: int) -> Iterator[None]:
    """Write the status of an error that leaves; then wait for checkpoints that are being written, copied or deleted."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, StopNow):
            changes = {"state": "stopped", "reason": str(error)}
        else:
            is_halt = getattr(error, "exit_code", None) == ExitCode.HALTED
            changes = {"state": "halted" if is_halt else "failed", "error": describe(error)}
        claimed.status.update(step=max(begun, state.step), force=True, **changes)
        raise
    finally:
        claimed.writer.close()
        claimed.close_mirror()
        claimed.store.settle()
