"""The run directory, as long as this process owns it: claimed before anything in it changes, kept, and given back."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch
from attrs import define, field

from gpt_simple._names import __version__
from gpt_simple.engine.resume import ResumePlan, flat
from gpt_simple.errors import CheckpointError, ConfigError
from gpt_simple.job.stages import Setup
from gpt_simple.run_dir.lineage import RunRecord
from gpt_simple.run_dir.lock import RunLock
from gpt_simple.run_dir.status import StatusFile
from gpt_simple.run_dir.stop_request import take_stop_request


class Dispossessed(CheckpointError):
    """The run directory was deleted, and another process owns what is there now."""


@define(eq=False)
class Ownership:
    """The lock of the run directory, and the small files in it.

    Every process has one, and only the main one's ``claim`` is called: the others own, keep and write nothing.
    """

    setup: Setup
    lock: RunLock = field(init=False)
    status: StatusFile = field(init=False)
    _record: RunRecord | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.lock = RunLock(self.setup.run_dir, self.setup.run.log.info)
        self.status = StatusFile(self.setup.run_dir, may_write=self.lock.is_held)

    def claim(self, resume: ResumePlan, *, force: bool) -> None:
        """Become the owner of the run directory, and only then change anything in it."""
        setup = self.setup
        run_dir, store, log = setup.run_dir, setup.store, setup.run.log
        run_dir.create()
        self.lock.acquire()
        # It was meant for the process before, which is gone.
        run_dir.stop_request.unlink(missing_ok=True)
        store.sweep()
        if force:
            run_dir.remove_run_files()
        elif list(resume.seen) != [found.path for found in store.list()]:
            raise CheckpointError(f"another run has written to {run_dir.root} just now: start again to go on from it")
        for path, reason in resume.skipped:
            moved = store.quarantine(path, reason)
            where = "stays where it is" if moved == path else f"is now {moved}"
            log.warning(f"{reason}; it {where}, and the one before it is used", name="checkpoint_skipped")
        setup.dataset.tokenizer.save(run_dir.tokenizer)

    def record(self, resume: ResumePlan) -> str:
        """Write down in run.json what runs, where, and from which checkpoint it goes on. Returns the run's id."""
        setup = self.setup
        run_dir, source = setup.run_dir, resume.checkpoint.path if resume.checkpoint else None
        if source is not None and source.parent == run_dir.checkpoints and not run_dir.run_json.exists():
            setup.run.log.warning(f"{run_dir.run_json} is gone: the run goes on under a new id", name="record_gone")
        self._record = RunRecord.load(run_dir)
        try:
            self._record.launched(_facts(setup), step=setup.run.step, resumed_from=source)
        except OSError as error:
            raise CheckpointError(f"{run_dir.run_json} cannot be written: {error.strerror}") from error
        return self._record.run_id

    def keep(self) -> None:
        """If somebody deleted the directory, make it anew, with all that a later launch and other commands need.

        Raises Dispossessed if a process that came since owns what is there now. Where nothing can be written, nothing
        happens: the next checkpoint tells.
        """
        setup = self.setup
        run_dir = setup.run_dir
        if not self.lock.is_lost():
            return
        try:
            run_dir.create()
        except ConfigError:
            return
        try:
            self.lock.renew()
        except CheckpointError as error:
            raise Dispossessed(f"{run_dir.root} was deleted under the run, and another began there: {error}") from error
        try:
            setup.dataset.tokenizer.save(run_dir.tokenizer)
            if self._record is not None:
                self._record.write()
        except OSError as error:
            setup.run.log.error(f"{run_dir.root} cannot be written: {error.strerror}", name="output_failed")
        self.status.update(force=True)
        message = f"{run_dir.root} is gone, with the earlier checkpoints: it is made anew"
        setup.run.log.error(message, name="output_gone")

    def asked_to_stop(self) -> str:
        """A reason to stop that somebody left in the directory, or nothing. Also keeps the directory."""
        self.keep()
        return take_stop_request(self.setup.run_dir) if self.lock.is_held() else ""

    def forced(self) -> None:
        """Leave a truthful status behind, at any moment: the process is about to end."""
        reason = "second Ctrl-C: the steps since the last checkpoint are lost"
        self.status.update(state="stopped", step=self.setup.run.step, reason=reason, force=True)

    def release(self) -> None:
        """Give the directory up; the status says how the run ended."""
        self.lock.release()


def _facts(setup: Setup) -> dict[str, Any]:
    run, origins = setup.run, setup.assembly.origins
    return {
        "version": __version__,
        "config": flat(run.config),
        "origins": {path: origin.where for path, origin in origins.by_path.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "plugins": {p.name: f"{p.distribution} {p.version}".strip() or p.file for p in setup.assembly.host.plugins},
        "run": run.facts(),
        "data": setup.identity["data"],
        "numerics": setup.identity["numerics"],
        "promise": setup.promise,
    }
