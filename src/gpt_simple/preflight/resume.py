"""What a launch would start from, as the engine decides it, but comparing sizes where the engine compares checksums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from gpt_simple.config.schema import Config
from gpt_simple.engine import resume as engine
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.preflight import PlannedResume, PreflightOptions
from gpt_simple.run_dir.layout import RunDir


def plan_resume(
    config: Config,
    options: PreflightOptions,
    plugins: Mapping[str, str],
    fingerprints: Callable[[], Mapping[str, str] | None],
) -> PlannedResume:
    """Raises CheckpointError for a checkpoint that must not be resumed.

    ``fingerprints`` of the data are asked for only if there is a checkpoint to compare them with; None: not known.
    """
    run_dir = RunDir(Path(config.training.output_dir))
    try:
        run_dir.check()
    except ConfigError:
        return PlannedResume("scratch")  # nothing can be there, and check_output refuses the directory
    found = engine.find_checkpoint(config, engine.SizeCheckingStore(run_dir.checkpoints), force=options.force)
    if found.checkpoint is None:
        return PlannedResume("scratch", skipped=found.skipped)
    saved = found.state["run"]
    numerics = saved["numerics"] | {"torch": version("torch"), "processes": options.world_size}
    now = engine.run_fingerprint(config, data=fingerprints() or saved["data"], numerics=numerics, plugins=plugins)
    step, path, samples = found.checkpoint.step, found.checkpoint.path, found.state["samples"]
    guarantee, changes = engine.resume_guarantee(saved, now, samples), engine.changes(saved, now, samples)
    return PlannedResume(found.kind, step, path, guarantee, changes, found.skipped, samples)
