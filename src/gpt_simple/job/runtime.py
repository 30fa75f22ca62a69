"""Precision, compilation and deadline of a launch, decided before any plugin is called."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen

from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.compile import CompilePlan, refuse_graphs
from gpt_simple.engine.compile import plan as plan_compile
from gpt_simple.engine.determinism import repeats_bits
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.precision import resolve as resolve_precision
from gpt_simple.engine.resume import with_determinism
from gpt_simple.engine.time_budget import Deadline
from gpt_simple.spec import RunSpec


@frozen
class Runtime:
    """``numerics`` holds what decides the last digits of a result, as JSON values."""

    precision: Precision
    compile_plan: CompilePlan
    deadline: Deadline | None
    numerics: Mapping[str, Any]


def resolve_runtime(spec: RunSpec, dist: ProcessGroup, began: float) -> Runtime:
    """Decide for all ranks, or fail on all. Raises ConfigError for what this machine cannot do."""
    return dist.all_or_none(lambda: _resolve(spec, dist, began))


def _resolve(spec: RunSpec, dist: ProcessGroup, began: float) -> Runtime:
    training = spec.config.training
    precision = resolve_precision(training.mixed_precision, dist.device)
    explicit = not spec.origins.is_default("training.compile")
    compile_plan = plan_compile(training, dist.device, dist.size, explicit=explicit)
    refuse_graphs(spec.config, compile_plan)
    deadline = Deadline.of_launch(training, os.environ, started=began, now=time.monotonic(), clock=time.time())
    numerics = {
        "processes": dist.size,
        "device": torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else dist.device.type,
        "precision": precision.name,
        "compile": f"{compile_plan.scope}/{compile_plan.backend}" if compile_plan.enabled else "off",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    numerics = with_determinism(numerics, repeats_bits())
    return Runtime(precision, compile_plan, deadline, numerics)
