"""``gpt_simple.train``: the job of ``gpt-simple run``, from Python."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_simple.config.load import plain, sections_of
from gpt_simple.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from gpt_simple.engine.compatibility import keep_values_of_run
from gpt_simple.errors import ConfigError
from gpt_simple.hardware import check_system
from gpt_simple.spec import resolve_spec

if TYPE_CHECKING:
    from gpt_simple.hooks import Plugin
    from gpt_simple.job.result import TrainResult

Section = Mapping[str, Any]

_frames_may_hold_memory = False
"""Whether the last run ended with an exception. The frames of its traceback and the exception refer to each other, so
its weights stay until Python looks for cycles, and the next run may not fit beside them."""


def train(
    config: str | Path | Config | None = None,
    *,
    model: ModelConfig | Section | None = None,
    data: DataConfig | Section | None = None,
    optimizer: OptimizerConfig | Section | None = None,
    training: TrainingConfig | Section | None = None,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Plugin[Any] | type[Plugin[Any]]] = (),
    force: bool = False,
) -> TrainResult:
    """Train a model, or resume a run that was stopped.

    ``config`` is a file or a Config. A section replaces the section of ``config``. ``overrides`` maps dotted keys to
    values (``{"training.max_steps": 10}``) and overrides everything else. ``plugins`` are active in addition to those
    of the configuration. ``force`` discards the checkpoints in ``training.output_dir``, once the new run is validated.

    The call leaves the process (random states, signal handlers, torch's flags) and ``config`` unchanged. Raises a
    subclass of GptSimpleError for an error that the user can correct.
    """
    check_system()
    if not (config is None or isinstance(config, Config | str | Path)):
        raise ConfigError(f"train(config=...): expected a path or a Config, got {type(config).__name__}")
    path, sections = (None, sections_of(config)) if isinstance(config, Config) else (config, {})
    given = {"model": model, "data": data, "optimizer": optimizer, "training": training}
    sections |= {name: section for name, section in given.items() if section is not None}
    texts = [(key, _text(key, plain(value))) for key, value in (overrides or {}).items()]
    spec = resolve_spec(path, sections=sections, overrides=texts, plugins=plugins)
    spec = keep_values_of_run(spec, force=force)
    # Imported here, because a mistake in the configuration must not cost the seconds that torch takes to load.
    from gpt_simple.job.train import train as run_job

    global _frames_may_hold_memory
    if _frames_may_hold_memory:
        gc.collect()
    _frames_may_hold_memory = True
    result = run_job(spec, force=force)
    _frames_may_hold_memory = False
    return result


def _text(key: str, value: Any) -> str:
    """An override as on a command line."""
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):
        message = f"expected a value of a configuration, got a {type(value).__name__}"
        raise ConfigError(message, location="train(overrides=...)", key=key) from None
