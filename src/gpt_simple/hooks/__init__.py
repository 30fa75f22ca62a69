"""The contract between the engine and plugins: everything that a plugin author imports. Free of torch."""

from __future__ import annotations

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
    Finding,
    GradientsReady,
    LogRecord,
    Metric,
    MetricsReady,
    ModelBuilt,
    RunEnd,
    RunError,
    RunStart,
    StepEnd,
    StepStart,
)
from gpt_simple.hooks.plugin import NoConfig, Plugin
from gpt_simple.hooks.run import CheckpointInfo, Run
from gpt_simple.hooks.specs import HOOKS, HookInfo, hookimpl

__all__ = [
    "HOOKS",
    "BatchReady",
    "CheckpointInfo",
    "CheckpointLoaded",
    "CheckpointSaved",
    "CheckpointSaving",
    "Close",
    "CollectMetrics",
    "Component",
    "EvalEnd",
    "Evaluate",
    "Finding",
    "GradientsReady",
    "HookInfo",
    "LogRecord",
    "Metric",
    "MetricsReady",
    "ModelBuilt",
    "NoConfig",
    "Plugin",
    "Registry",
    "Run",
    "RunEnd",
    "RunError",
    "RunStart",
    "StepEnd",
    "StepStart",
    "hookimpl",
]
