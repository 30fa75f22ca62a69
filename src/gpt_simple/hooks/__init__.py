"""The contract between the engine and plugins: everything that a plugin author imports. Free of torch.

Start with ``specs.py``, the hooks, and ``events.py``, their arguments. Names load when they are used, because every
command lists the installed plugins and none of these names is needed for that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_simple.hooks.batch import Batch
    from gpt_simple.hooks.components import Component, Registry
    from gpt_simple.hooks.events import (
        BatchReady,
        CheckpointLoaded,
        CheckpointSaved,
        CheckpointSaving,
        Close,
        CollectMetrics,
        EvalEnd,
        Evaluate,
        GradientsReady,
        LogRecord,
        MetricsReady,
        ModelBuilt,
        OptimizerBuilt,
        RunEnd,
        RunError,
        RunStart,
        StepEnd,
        StepStart,
    )
    from gpt_simple.hooks.losses import Loss, Losses
    from gpt_simple.hooks.plugin import NoConfig, Plugin
    from gpt_simple.hooks.preflight import (
        BatchStage,
        CheckedOutput,
        ConfigChanges,
        Environment,
        InspectedData,
        MemoryForecast,
        MemoryPrediction,
        PlannedResume,
        Preflight,
        PreflightOptions,
        ThroughputEstimate,
    )
    from gpt_simple.hooks.results import Finding, Metric
    from gpt_simple.hooks.run import CheckpointInfo, Run
    from gpt_simple.hooks.specs import HOOKS, HookInfo, hookimpl
    from gpt_simple.hooks.step import Backward, Step, accumulate
    from gpt_simple.hooks.store import CheckpointStore

__all__ = [
    "HOOKS",
    "Backward",
    "Batch",
    "BatchReady",
    "BatchStage",
    "CheckedOutput",
    "CheckpointInfo",
    "CheckpointLoaded",
    "CheckpointSaved",
    "CheckpointSaving",
    "CheckpointStore",
    "Close",
    "CollectMetrics",
    "Component",
    "ConfigChanges",
    "Environment",
    "EvalEnd",
    "Evaluate",
    "Finding",
    "GradientsReady",
    "HookInfo",
    "InspectedData",
    "LogRecord",
    "Loss",
    "Losses",
    "MemoryForecast",
    "MemoryPrediction",
    "Metric",
    "MetricsReady",
    "ModelBuilt",
    "NoConfig",
    "OptimizerBuilt",
    "PlannedResume",
    "Plugin",
    "Preflight",
    "PreflightOptions",
    "Registry",
    "Run",
    "RunEnd",
    "RunError",
    "RunStart",
    "Step",
    "StepEnd",
    "StepStart",
    "ThroughputEstimate",
    "accumulate",
    "hookimpl",
]

_MODULES = (
    *("specs", "plugin", "run", "results", "events", "components", "preflight"),
    *("step", "batch", "losses", "store"),
)
"""Where the names are, the modules that most commands need first: a name imports those before its own."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            if value is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
