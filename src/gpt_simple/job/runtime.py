"""Precision, compilation and deadline of a launch, decided before any plugin is called."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve, frozen

from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
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
    """``numerics`` holds what decides the last digits of a result, as JSON values.

    ``checkpointing`` is that of the configuration, and ``compile_plan`` is made for it, until the data are known.
    """

    precision: Precision
    checkpointing: ActivationCheckpointing
    compile_plan: CompilePlan
    deadline: Deadline | None
    numerics: Mapping[str, Any]


def resolve_runtime(spec: RunSpec, dist: ProcessGroup, began: float) -> Runtime:
    """Decide for all ranks, or fail on all. Raises ConfigError for what this machine cannot do."""
    return dist.all_or_none(lambda: _resolve(spec, dist, began))


def _resolve(spec: RunSpec, dist: ProcessGroup, began: float) -> Runtime:
    training = spec.config.training
    precision = evolve(resolve_precision(training.mixed_precision, dist.device), of_weights=dist.shards)
    checkpointing = ActivationCheckpointing.of(spec.config)
    compile_plan = _compile_plan(spec, dist, checkpointing)
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
    if dist.shards:
        numerics["parallel"] = f"fsdp by {training.shard_size}" if training.shard_size else "fsdp"
    numerics = with_determinism(numerics, repeats_bits())
    return Runtime(precision, checkpointing, compile_plan, deadline, numerics)


def with_checkpointing(
    runtime: Runtime, spec: RunSpec, dist: ProcessGroup, checkpointing: ActivationCheckpointing
) -> Runtime:
    """``runtime`` of a launch that makes this gradient checkpointing."""
    return evolve(runtime, checkpointing=checkpointing, compile_plan=_compile_plan(spec, dist, checkpointing))


def _compile_plan(spec: RunSpec, dist: ProcessGroup, checkpointing: ActivationCheckpointing) -> CompilePlan:
    explicit = not spec.origins.is_default("training.compile")
    return plan_compile(checkpointing.applied(spec.config).training, dist.device, dist.size, explicit=explicit)
