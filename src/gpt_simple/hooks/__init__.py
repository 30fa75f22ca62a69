"""The contract between the engine and plugins: everything that a plugin author imports. Free of torch.

Names load when they are used: looking at what is installed, which every command does, needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        RunEnd,
        RunError,
        RunStart,
        StepEnd,
        StepStart,
    )
    from gpt_simple.hooks.plugin import NoConfig, Plugin
    from gpt_simple.hooks.preflight import (
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

__all__ = [
    "HOOKS",
    "BatchReady",
    "CheckedOutput",
    "CheckpointInfo",
    "CheckpointLoaded",
    "CheckpointSaved",
    "CheckpointSaving",
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
    "MemoryForecast",
    "MemoryPrediction",
    "Metric",
    "MetricsReady",
    "ModelBuilt",
    "NoConfig",
    "PlannedResume",
    "Plugin",
    "Preflight",
    "PreflightOptions",
    "Registry",
    "Run",
    "RunEnd",
    "RunError",
    "RunStart",
    "StepEnd",
    "StepStart",
    "ThroughputEstimate",
    "hookimpl",
]

_HOMES = {
    "Component": "components",
    "Registry": "components",
    **dict.fromkeys(
        (
            "CheckedOutput",
            "ConfigChanges",
            "Environment",
            "InspectedData",
            "MemoryForecast",
            "MemoryPrediction",
            "PlannedResume",
            "Preflight",
            "PreflightOptions",
            "ThroughputEstimate",
        ),
        "preflight",
    ),
    "Finding": "results",
    "Metric": "results",
    "CheckpointInfo": "run",
    "Run": "run",
    "NoConfig": "plugin",
    "Plugin": "plugin",
    "HOOKS": "specs",
    "HookInfo": "specs",
    "hookimpl": "specs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # All others are events.
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'events')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
