"""The checkpoints of a run in the store that ``training.checkpoint_store`` names, beside those in the run directory.

A launch fetches a checkpoint that is newer than the local ones. A checkpoint that is durable in the run directory is
copied by a thread, so that training does not wait. A failure is reported and tried again; training goes on. The end of
the run waits for what is not in the store yet.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from gpt_simple.checkpoint.manifest import Unreadable
from gpt_simple.checkpoint.store import Checkpoint, Store, step_of
from gpt_simple.config.schema import Config
from gpt_simple.errors import PASSING, CheckpointError, GptSimpleError, PluginError, describe
from gpt_simple.hooks.components import LOCAL, Component
from gpt_simple.hooks.run import Log
from gpt_simple.hooks.store import CheckpointStore
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord

RECORD = "run"
"""Stem of the document of a checkpoint that has the content of run.json, for another machine."""

_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts. Where a launch cannot go on without the store, they are all the attempts there are."""
_LONGEST_PAUSE = 60.0
_REPEAT_SECONDS = 60.0
"""How often a persistent failure is reported again."""
_KEY = "training.checkpoint_store"


class StoreFailed(CheckpointError):
    """The store cannot be used, or not by this run, and the launch cannot go on without it."""


@frozen
class _Task:
    """A checkpoint to copy into the store, or to remove from it."""

    path: Path
    is_removal: bool = False


@define(eq=False)
class Mirror:
    """The store of one run, on the main process. ``label`` names the component and its owner, ``name`` it alone."""

    name: str
    label: str
    _remote: CheckpointStore
    _local: Store
    _there: set[str] = field(factory=set, init=False)
    """Names of the checkpoints in the store."""
    _tasks: list[_Task] = field(factory=list, init=False)
    _changed: threading.Condition = field(factory=threading.Condition, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _attempts_left: float = field(default=math.inf, init=False)
    _awaited: bool = field(default=False, init=False)
    """Whether the end of the run has waited for the store."""
    _ends: bool = field(default=False, init=False)
    _done: list[tuple[str, float]] = field(factory=list, init=False)
    """Checkpoints that were copied since the last report, and the seconds that each took."""
    _damaged: list[str] = field(factory=list, init=False)
    """Why local checkpoints are not copied, since the last report."""
    _failure: str = field(default="", init=False)
    _reported: float = field(default=-math.inf, init=False)

    @classmethod
    def open(cls, part: Component, config: Config, local: Store, *, force: bool) -> Mirror:
        """Build the component ``part`` and read what it holds.

        Raises StoreFailed if it cannot be reached, and CheckpointError if a run from scratch would find in it the
        checkpoints of an earlier one.
        """
        mirror = cls(f"{part.kind} {part.name!r}", part.label, part.build(config), local)
        mirror.find()
        if force or config.training.resume == "scratch":
            mirror.refuse_earlier_run(force=force)
        return mirror

    def find(self) -> None:
        """Read what the store holds."""
        names = self._insist("find", lambda: list(self._remote.find()), "cannot be reached")
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise PluginError(f"{self.label} finds {wrong[0]!r}", hint="expected names such as 'step-00001000'")
        self._there = {name for name in names if step_of(name) is not None}

    def refuse_earlier_run(self, *, force: bool) -> None:
        """Raise CheckpointError if a run from scratch would find the checkpoints of an earlier one in the store."""
        if not self._there or (force and self._removes):
            return
        problem = f"the {self.label} holds {len(self._there)} checkpoint(s), the newest {self.newer_than(None)[0]}"
        if force:
            raise CheckpointError(f"{problem}, and it cannot remove them", key=_KEY, hint="use another place in it")
        raise CheckpointError(
            f'training.resume is "scratch" but {problem}',
            hint="add --force to discard them, or use another place in it",
        )

    def fetch_newer(
        self, newest: Checkpoint | None, run_dir: RunDir, check: Callable[[Checkpoint], object], log: Log
    ) -> None:
        """Fetch the newest valid checkpoint after ``newest`` into the run directory, which the caller has locked.

        A damaged one is reported, and the one before it is fetched. Raises StoreFailed if the store cannot be read, and
        CheckpointError if nothing valid is left.
        """
        RunRecord.load(run_dir)  # a damaged run.json is no damage of a checkpoint
        skipped: list[str] = []
        for name in self.newer_than(newest):
            log.info(f"{name} is fetched from the {self.name}", name="checkpoint_fetched")
            try:
                self._fetch(name, run_dir, check)
            except (StoreFailed, Unreadable):
                raise
            except CheckpointError as error:
                skipped.append(str(error))
                log.warning(f"{error}; the one before {name} is used", name="checkpoint_skipped")
            except OSError as error:
                raise CheckpointError(f"{name} was not fetched to {self._local.root}: {error.strerror}") from error
            else:
                return
        if newest is None and skipped:
            raise CheckpointError(
                "".join([f"no checkpoint in the {self.label} can be used:", *(f"\n  {reason}" for reason in skipped)]),
                hint="add --force to discard them and start from scratch, or use another place in it",
            )

    def newer_than(self, checkpoint: Checkpoint | None) -> Sequence[str]:
        """Names in the store with more steps than ``checkpoint``, the newest first."""
        steps = {name: step_of(name) or 0 for name in self._there}
        newer = [name for name in steps if checkpoint is None or steps[name] > checkpoint.step]
        return sorted(newer, key=steps.__getitem__, reverse=True)

    def discard(self) -> None:
        """Remove what an earlier run left in the store. Raises StoreFailed if that fails."""
        for name in sorted(self._there):
            self._insist(f"remove {name}", partial(self._remote.removed, name), "cannot be emptied")  # type: ignore[attr-defined]
            self._there.discard(name)

    def begin(self, path: Path) -> None:
        """Copy a checkpoint into the store, in the background."""
        self._add(_Task(path))

    def begin_missing(self) -> None:
        """Copy all checkpoints of the run directory that the store lacks, as after a kill."""
        for checkpoint in self._local.list():
            if checkpoint.path.name not in self._there:
                self.begin(checkpoint.path)

    def removed(self, pruned: Iterable[Checkpoint]) -> None:
        """Let the store follow the retention of the run directory, in the background."""
        for checkpoint in pruned:
            if checkpoint.path.name in self._there and self._removes:
                self._add(_Task(checkpoint.path, is_removal=True))

    def report(self, log: Log) -> Sequence[float]:
        """Log what has happened since the last report. Returns the seconds of each copy."""
        with self._changed:
            done, self._done = self._done, []
            damaged, self._damaged = self._damaged, []
            failure, self._failure = self._failure, ""
        for problem in damaged:
            log.warning(problem, name="checkpoint_skipped")
        for name, seconds in done:
            self._reported = -math.inf
            log.info(f"{name} is in the {self.name} ({seconds:.1f} s)", name="checkpoint_stored")
        if failure and (now := time.monotonic()) - self._reported >= _REPEAT_SECONDS:
            self._reported = now
            log.error(f"{failure}; training goes on, and it is tried again", name="store_failed")
        return [seconds for _, seconds in done]

    def finish(self, log: Log) -> None:
        """Wait until all is in the store. Raises StoreFailed after some attempts without success."""
        with self._changed:
            self._awaited = True
            self._attempts_left = len(_PAUSES) + 1
            self._changed.notify_all()
            if names := ", ".join(task.path.name for task in self._tasks if not task.is_removal):
                log.info(f"waiting for the {self.name}: {names}", name="store_awaited")
            while self._tasks and self._attempts_left and self._thread is not None and self._thread.is_alive():
                self._changed.wait(0.2)
            left, failure = self._tasks, self._failure
            self._failure = ""
        self.report(log)
        if missing := sorted(str(task.path) for task in left if not task.is_removal):
            raise StoreFailed(
                f"{failure}. The store lacks {', '.join(missing)}",
                key=_KEY,
                hint="nothing is lost: the same command, started here again, copies it",
            )
        if failure:
            log.warning(failure, name="store_failed")

    def close(self, log: Log, *, owns_run: bool) -> None:
        """End the thread. If an error ends the run, what is not in the store yet is waited for, and only logged.

        ``owns_run``: the run directory is not another process's.
        """
        if owns_run and not self._awaited:
            self.begin_missing()
            try:
                self.finish(log)
            except StoreFailed as error:
                log.error(str(error), name="store_failed")
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    @property
    def _removes(self) -> bool:
        return hasattr(self._remote, "removed")

    def _insist(self, what: str, work: Callable[[], Any], problem: str) -> Any:
        """The result of ``work``, which is tried some times. Raises StoreFailed with its last failure."""
        failure: BaseException | None = None
        for pause in (0.0, *_PAUSES):
            time.sleep(pause)
            try:
                return work()
            except (GptSimpleError, *PASSING):
                raise
            except BaseException as error:
                failure = error
        assert failure is not None
        raise StoreFailed(
            f"the {self.label} {problem}: {what} failed with {describe(failure)}",
            key=_KEY,
            hint=f'set "{LOCAL}" to go on with the run directory alone',
        ) from failure

    def _fetch(self, name: str, run_dir: RunDir, check: Callable[[Checkpoint], object]) -> None:
        def copy(directory: Path) -> None:
            for path in directory.iterdir():  # of an attempt that failed
                path.unlink()
            self._remote.fetch(name, directory)

        def checked(arrived: Checkpoint) -> None:
            check(arrived)
            self._keep_id(arrived, run_dir)

        self._local.receive(
            step_of(name) or 0,
            lambda directory: self._insist(f"fetch {name}", partial(copy, directory), "cannot be read"),
            checked,
        )

    def _keep_id(self, arrived: Checkpoint, run_dir: RunDir) -> None:
        """Write the run.json that came with a checkpoint, unless there is one: the run keeps its id.

        Raises StoreFailed if the directory holds another run.
        """
        path = arrived.path / f"{RECORD}.json"
        if not path.exists():
            return
        try:
            record = RunRecord.of(run_dir, self._local.load_document(arrived, RECORD))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        if not run_dir.run_json.exists():
            record.write()
        elif (mine := RunRecord.load(run_dir).run_id) != record.run_id:
            raise StoreFailed(
                f"step {arrived.step} in the {self.label} is of the run {record.run_id}, and {run_dir.root} holds the"
                f" run {mine}",
                key=_KEY,
                hint="each run needs its own place in the store",
            )

    def _add(self, task: _Task) -> None:
        with self._changed:
            # A checkpoint that is pruned, or written again, needs no copy of what it was.
            self._tasks = [*self._tasks[:1], *(each for each in self._tasks[1:] if each.path != task.path), task]
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-store", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        """Do one task after another. One that fails comes again after the others."""
        failures = 0
        while (task := self._next()) is not None:
            began = time.monotonic()
            try:
                copied = self._do(task)
            except BaseException as error:
                verb = "removed from" if task.is_removal else "copied to"
                failure = f"{task.path.name} was not {verb} the {self.label}: {describe(error)}"
                failures += 1
            else:
                failure, failures = "", 0
            with self._changed:
                self._tasks.pop(0)
                self._failure = failure
                if not failure and copied:
                    self._done.append((task.path.name, time.monotonic() - began))
                if failure:
                    self._tasks.append(task)
                    self._attempts_left -= 1
                    self._pause(failures)
                self._changed.notify_all()

    def _next(self) -> _Task | None:
        with self._changed:
            while not self._tasks and not self._ends:
                self._changed.wait()
            return None if self._ends or not self._attempts_left else self._tasks[0]

    def _pause(self, failures: int) -> None:
        """Wait before the next attempt; at the end of the run only as long as the first attempts do."""
        if math.isfinite(self._attempts_left):
            failures = len(_PAUSES) + 1 - int(self._attempts_left)
        seconds = _PAUSES[failures - 1] if failures <= len(_PAUSES) else _LONGEST_PAUSE
        before, until = self._attempts_left, time.monotonic() + seconds
        while before == self._attempts_left > 0 and not self._ends and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)

    def _do(self, task: _Task) -> bool:
        """Whether a checkpoint was copied. One that is gone, or damaged, is not."""
        name = task.path.name
        if task.is_removal:
            if not task.path.exists():  # else it was written again
                self._remote.removed(name)  # type: ignore[attr-defined]
                self._there.discard(name)
            return False
        with self._local.in_use(task.path) as is_there:
            if not is_there:
                return False
            try:
                self._local.verify_once(task.path)
            except Unreadable:
                raise
            except CheckpointError as error:
                self._damaged.append(f"{error}: it is not copied to the {self.label}")
                return False
            self._remote.published(task.path)
        self._there.add(name)
        return True
