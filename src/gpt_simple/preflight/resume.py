"""What a launch would start from, as the engine decides it, but comparing sizes where the engine compares checksums."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attrs import define, frozen

from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.engine import resume as engine
from gpt_simple.errors import ConfigError, GptSimpleError
from gpt_simple.run_dir.layout import RunDir

if TYPE_CHECKING:
    from gpt_simple.preflight.preflight import Outlook


@frozen
class ResumeOutlook:
    """``scratch``, ``resume`` from ``path`` at ``step`` after so many ``samples``, or ``finished``; ``skipped`` are
    damaged checkpoints that are newer.

    ``promise`` is what going on keeps: ``bit-exact``, ``order-exact: ...`` or ``changed: ...``, as far as the
    configuration, the data and the installed torch tell. ``changes``: what is configured otherwise than before.
    """

    kind: Literal["scratch", "resume", "finished"]
    step: int = 0
    path: Path | None = None
    promise: str = ""
    changes: engine.Changes | None = None
    skipped: Sequence[tuple[Path, str]] = ()
    samples: int = 0


@define
class _Glance(Store):
    """A store that believes a file of the right size."""

    def verify(self, checkpoint: Checkpoint, *, full: bool = True) -> None:
        super().verify(checkpoint, full=False)
        self._verified.add(checkpoint.path)


def look(outlook: Outlook) -> ResumeOutlook:
    """Raises CheckpointError for what must not go on."""
    config = outlook.config
    run_dir = RunDir(Path(config.training.output_dir))
    try:
        run_dir.check()
    except ConfigError:
        return ResumeOutlook("scratch")  # nothing can be there; a finding of its own
    plan = engine.look(config, run_dir, force=outlook.questions.force, store=_Glance(run_dir.checkpoints))
    if plan.checkpoint is None:
        return ResumeOutlook("scratch", skipped=plan.skipped)
    saved = plan.state["run"]
    try:
        data = outlook.data.fingerprints or saved["data"]
    except GptSimpleError:
        data = saved["data"]  # a finding of its own
    numerics = saved["numerics"] | {"torch": version("torch"), "processes": outlook.questions.world_size}
    now = engine.identity(config, data=data, numerics=numerics, plugins=outlook.plugins)
    step, path, samples = plan.checkpoint.step, plan.checkpoint.path, plan.state["samples"]
    kept, changes = engine.promise(saved, now, samples), engine.changes(saved, now, samples)
    return ResumeOutlook(plan.kind, step, path, kept, changes, plan.skipped, samples)
