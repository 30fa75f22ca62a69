"""Pretrain GPT-style language models: a small engine, everything else a plugin.

A name is imported when it is used, so importing this package imports neither torch nor another slow package.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gpt_simple._names import __version__

if TYPE_CHECKING:
    from gpt_simple.api import train
    from gpt_simple.config.redact import redacted
    from gpt_simple.config.schema import (
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        PluginsConfig,
        TrainingConfig,
    )
    from gpt_simple.config.types import LegacyDefault
    from gpt_simple.data.sources import Document
    from gpt_simple.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ExitCode,
        GptSimpleError,
        PluginError,
    )
    from gpt_simple.hooks import Finding, Metric, NoConfig, Plugin, Run, hookimpl
    from gpt_simple.job.result import TrainResult
    from gpt_simple.run_dir.lineage import read_metrics

_HOMES = {
    "train": "gpt_simple.api",
    "redacted": "gpt_simple.config.redact",
    "read_metrics": "gpt_simple.run_dir.lineage",
    "TrainResult": "gpt_simple.job.result",
    **dict.fromkeys(
        ("Config", "DataConfig", "ModelConfig", "OptimizerConfig", "PluginsConfig", "TrainingConfig"),
        "gpt_simple.config.schema",
    ),
    **dict.fromkeys(
        ("CheckpointError", "ConfigError", "DataError", "ExitCode", "GptSimpleError", "PluginError"),
        "gpt_simple.errors",
    ),
    "LegacyDefault": "gpt_simple.config.types",
    "Document": "gpt_simple.data.sources",
    **dict.fromkeys(("Finding", "Metric", "NoConfig", "Plugin", "Run", "hookimpl"), "gpt_simple.hooks"),
}

_DEPRECATED = {
    "MemoryPrediction": ("gpt_simple.hooks", "gpt_simple.hooks.MemoryPrediction"),
    "predict_memory": ("gpt_simple.preflight.memory", "preflight.predict_memory in check_config or check_runtime"),
}
"""Name -> its module, and what replaces it."""

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Document",
    "ExitCode",
    "Finding",
    "GptSimpleError",
    "LegacyDefault",
    "Metric",
    "ModelConfig",
    "NoConfig",
    "OptimizerConfig",
    "Plugin",
    "PluginError",
    "PluginsConfig",
    "Run",
    "TrainResult",
    "TrainingConfig",
    "__version__",
    "hookimpl",
    "read_metrics",
    "redacted",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        from gpt_simple.deprecation import warn_deprecated

        module, instead = _DEPRECATED[name]
        # `from gpt_simple import NAME` calls this twice: for the import system, then for the line itself.
        if sys._getframe(1).f_globals.get("__name__") != "importlib._bootstrap":
            warn_deprecated(f"gpt_simple.{name}", removal="1.0", instead=instead)
        return getattr(importlib.import_module(module), name)
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'gpt_simple' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
