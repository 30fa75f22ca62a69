"""What a launch would start from, as the engine decides it, but comparing sizes where the engine compares checksums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from attrs import define

from gpt_simple.checkpoint.manifest import Manifest, check_file
from gpt_simple.checkpoint.store import Checkpoint, Store, step_of
from gpt_simple.config.schema import Config
from gpt_simple.engine import resume as engine
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.engine.mirror import Mirror
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.components import LOCAL, Registry
from gpt_simple.hooks.preflight import InspectedData, PlannedResume, PreflightOptions
from gpt_simple.run_dir.layout import RunDir


@define
class _SizeCheckingStore(Store):
    """A store that compares the sizes of files, and checksums only of the documents, which are read here."""

    def verify(self, checkpoint: Checkpoint, *, full: bool = True) -> None:
        super().verify(checkpoint, full=False)
        for name, entry in Manifest.read(checkpoint.path).files.items():
            if name.endswith(".json"):
                check_file(checkpoint.path / name, entry, full=True)
        self._verified.add(checkpoint.path)


def plan_resume(
    config: Config,
    registry: Registry,
    options: PreflightOptions,
    plugins: Mapping[str, str],
    inspect_data: Callable[[], InspectedData | None],
) -> PlannedResume:
    """Raises CheckpointError for a checkpoint that must not be resumed, and if the store cannot be reached.

    ``inspect_data`` is called only if there is a checkpoint to compare the data with. None, and data without
    fingerprints, count as those of the checkpoint.
    """
    run_dir = RunDir(Path(config.training.output_dir))
    try:
        run_dir.check()
    except ConfigError:
        return PlannedResume("scratch")  # nothing can be there, and check_output refuses the directory
    store = _SizeCheckingStore(run_dir.checkpoints)
    # A launch reads the store a moment later.
    if config.training.checkpoint_store != LOCAL and not options.launching:
        part = registry.get("store", config.training.checkpoint_store)
        mirror = Mirror.open(part, config, store, force=options.force)
        if not (options.force or config.training.resume == "scratch"):
            newest, skipped = store.newest_valid(partial(engine.load_state, config, store))
            if newer := mirror.newer_than(newest):
                return _fetched(step_of(newer[0]) or 0, mirror.label, skipped, config, options)
    found = engine.find_checkpoint(config, store, force=options.force)
    if found.checkpoint is None:
        return PlannedResume("scratch", skipped=found.skipped)
    saved, samples, data = found.state["run"], found.state["samples"], inspect_data()
    fingerprints = data.fingerprints if data is not None and data.fingerprints else saved["data"]
    numerics = saved["numerics"] | {"torch": version("torch"), "processes": options.world_size}
    numerics = engine.with_determinism(numerics, config.training.deterministic)
    config = ActivationCheckpointing.of(config, found.gradient_checkpointing).applied(config)
    now = engine.run_fingerprint(config, data=fingerprints, numerics=numerics, plugins=plugins)
    finished = engine.why_finished(found, now)
    return PlannedResume(
        kind="finished" if finished else "resume",
        step=found.checkpoint.step,
        path=found.checkpoint.path,
        guarantee=engine.resume_guarantee(saved, now, samples),
        changes=engine.changes(saved, now, samples),
        skipped=found.skipped,
        samples=samples,
        finished=finished,
        gradient_checkpointing=found.gradient_checkpointing,
    )


def _fetched(
    step: int, label: str, skipped: Sequence[tuple[Path, str]], config: Config, options: PreflightOptions
) -> PlannedResume:
    """A resume from a checkpoint that the launch fetches: only its name is known."""
    training = config.training
    rows = training.per_device_batch_size * training.gradient_accumulation_steps * options.world_size
    kind: Literal["finished", "resume"] = "finished" if step >= training.max_steps else "resume"
    return PlannedResume(kind, step, skipped=skipped, samples=step * rows, store=label)
