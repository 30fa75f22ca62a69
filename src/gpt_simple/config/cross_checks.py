"""Combinations of values that cannot work, each of which would be fine alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpt_simple.config.schema import DataConfig, ModelConfig, PluginsConfig, TrainingConfig
from gpt_simple.errors import Problem

Conflict = tuple[tuple[str, ...], Problem]
"""The dotted paths of fields that do not go together, and the problem with their values."""


def conflicts(model: Any, data: Any, training: Any, plugins: Any) -> Iterator[Conflict]:
    """Every conflict between fields. A section that is None or of a component's own class is left out."""
    if type(model) is ModelConfig:
        yield from _heads(model)
        yield from _positions(model)
        if isinstance(data, DataConfig) and model.n_positions is not None and model.n_positions < data.max_length:
            message = f"max_length {data.max_length} is longer than the model's n_positions {model.n_positions}"
            yield _conflict(message, "model.n_positions", "data.max_length")
    if isinstance(data, DataConfig):
        yield from _packing(data)
        yield from _curriculum(data)
    if isinstance(training, TrainingConfig):
        if training.shard_size is not None and training.parallel != "fsdp":
            message = f'shard_size {training.shard_size} needs parallel "fsdp", not "{training.parallel}"'
            yield _conflict(message, "training.shard_size", "training.parallel")
        yield from _warmup_stages(training, getattr(data, "max_length", None))
        yield from _activations(training)
        budget, reserve = training.max_runtime_seconds, training.walltime_reserve_seconds
        if budget is not None and reserve >= budget:
            message = f"walltime_reserve_seconds {reserve:g} leaves nothing of max_runtime_seconds {budget:g}"
            yield _conflict(message, "training.max_runtime_seconds", "training.walltime_reserve_seconds")
    if isinstance(plugins, PluginsConfig):
        for name in sorted(set(plugins.require) & set(plugins.disable)):
            message = f'plugin "{name}" is both required and disabled'
            yield _conflict(message, "plugins.require", "plugins.disable", hint="remove it from one of the lists")


def _heads(model: ModelConfig) -> Iterator[Conflict]:
    n_embd, n_head, n_kv_head = model.n_embd, model.n_head, model.n_kv_head
    if n_embd % n_head:
        yield _conflict(f"n_embd {n_embd} is not a multiple of n_head {n_head}", "model.n_embd", "model.n_head")
    elif model.position == "rope" and (n_embd // n_head) % 2:
        message = f'the width of a head, n_embd / n_head = {n_embd // n_head}, must be even for position "rope"'
        yield _conflict(message, "model.n_embd", "model.n_head", "model.position")
    if n_kv_head is not None and n_head % n_kv_head:
        message = f"n_head {n_head} is not a multiple of n_kv_head {n_kv_head}"
        yield _conflict(message, "model.n_head", "model.n_kv_head")


def _positions(model: ModelConfig) -> Iterator[Conflict]:
    scaling, factor = model.rope_scaling_type, model.rope_scaling_factor
    if scaling is None and factor != 1:
        message = f"rope_scaling_factor {factor:g} needs a rope_scaling_type (linear or ntk)"
        yield _conflict(message, "model.rope_scaling_type", "model.rope_scaling_factor")
    if scaling is not None and model.position != "rope":
        message = f'rope_scaling_type "{scaling}" needs position "rope", not "{model.position}"'
        yield _conflict(message, "model.rope_scaling_type", "model.position")


def _packing(data: DataConfig) -> Iterator[Conflict]:
    if data.overlap_size >= data.max_length:
        message = f"overlap_size {data.overlap_size} must be smaller than max_length {data.max_length}"
        yield _conflict(message, "data.overlap_size", "data.max_length")
    if data.overlap_size and data.packing != "best_fit":
        message = f'overlap_size {data.overlap_size} needs packing "best_fit", not "{data.packing}"'
        yield _conflict(message, "data.overlap_size", "data.packing")


def _curriculum(data: DataConfig) -> Iterator[Conflict]:
    for index, phase in enumerate(data.curriculum):
        path, duration = f"data.curriculum[{index}]", phase.duration_tokens
        negative = sorted(bucket for bucket, weight in phase.mix.items() if weight < 0)
        if negative:
            yield _conflict(f"the weight of {', '.join(negative)} is negative", f"{path}.mix", hint="weights are >= 0")
        elif sum(phase.mix.values()) <= 0:
            yield _conflict("the mix needs at least one bucket with a positive weight", f"{path}.mix")
        # The last phase goes on as long as there are steps.
        if index + 1 < len(data.curriculum) and not round(duration / data.max_length):
            message = (
                f"phase {index + 1} lasts {duration:,} tokens, half a row of max_length {data.max_length:,} or less: "
                "nothing would be read in it"
            )
            hint = "make it longer or leave it out"
            yield _conflict(message, f"{path}.duration_tokens", "data.max_length", hint=hint)


def _activations(training: TrainingConfig) -> Iterator[Conflict]:
    """Only a compiler divides its graph by a budget, and checkpointing has divided that graph before."""
    if (budget := training.activation_memory_budget) is None:
        return
    what, path = f"activation_memory_budget {budget:g}", "training.activation_memory_budget"
    if not training.compile:
        hint = "set compile to true, or leave activation_memory_budget out"
        yield _conflict(f"{what} needs compile: only the compiler has one", path, "training.compile", hint=hint)
    if training.compile_backend == "eager":
        hint = 'use "inductor", or leave activation_memory_budget out'
        yield _conflict(f'{what} does nothing with the backend "eager"', path, "training.compile_backend", hint=hint)
    if training.gradient_checkpointing not in (False, "auto"):
        hint = 'set gradient_checkpointing to "auto" or false'
        message = f"{what} says what is recomputed, and so does gradient_checkpointing"
        yield _conflict(message, path, "training.gradient_checkpointing", hint=hint)


def _warmup_stages(training: TrainingConfig, max_length: int | None) -> Iterator[Conflict]:
    for index, stage in enumerate(training.warmup_stages):
        if (length := stage.length) is not None and max_length is not None and max_length % length:
            message = f"length {length} of stage {index + 1} does not divide max_length {max_length}"
            below = (size for size in range(min(length, max_length), 1, -1) if max_length % size == 0)
            hint = f"{next(below, max_length)} does: a sample is cut into rows of equal length"
            yield _conflict(message, f"training.warmup_stages[{index}].length", "data.max_length", hint=hint)


def _conflict(message: str, *paths: str, hint: str = "") -> Conflict:
    return paths, Problem(None, "", message, hint)
