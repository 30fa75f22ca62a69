"""Combinations of values that cannot work, each of which would be fine alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen

from gpt_simple.config.schema import DataConfig, ModelConfig, PluginsConfig, TrainingConfig


@frozen
class Conflict:
    """Fields that do not go together, as dotted paths, one sentence with their values, and what to do."""

    paths: tuple[str, ...]
    message: str
    hint: str = ""


def conflicts(model: Any, data: Any, training: Any, plugins: Any) -> Iterator[Conflict]:
    """Every conflict between fields. A section that is None or of a component's own class is left out."""
    if type(model) is ModelConfig:
        yield from _heads(model)
        yield from _positions(model)
        if isinstance(data, DataConfig):
            yield from _lengths(model, data)
    if isinstance(data, DataConfig):
        yield from _packing(data)
        yield from _curriculum(data)
    if isinstance(training, TrainingConfig):
        yield from _walltime(training)
    if isinstance(plugins, PluginsConfig):
        for name in sorted(set(plugins.require) & set(plugins.disable)):
            yield Conflict(
                ("plugins.require", "plugins.disable"),
                f'plugin "{name}" is both required and disabled',
                "remove it from one of the lists",
            )


def _heads(model: ModelConfig) -> Iterator[Conflict]:
    if model.n_embd % model.n_head:
        yield Conflict(
            ("model.n_embd", "model.n_head"),
            f"n_embd {model.n_embd} is not a multiple of n_head {model.n_head}",
        )
    elif model.position == "rope" and (model.n_embd // model.n_head) % 2:
        yield Conflict(
            ("model.n_embd", "model.n_head", "model.position"),
            f'the width of a head, n_embd / n_head = {model.n_embd // model.n_head}, must be even for position "rope"',
        )
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        yield Conflict(
            ("model.n_head", "model.n_kv_head"),
            f"n_head {model.n_head} is not a multiple of n_kv_head {model.n_kv_head}",
        )


def _positions(model: ModelConfig) -> Iterator[Conflict]:
    if model.rope_scaling_type is None and model.rope_scaling_factor != 1:
        yield Conflict(
            ("model.rope_scaling_type", "model.rope_scaling_factor"),
            f"rope_scaling_factor {model.rope_scaling_factor:g} needs a rope_scaling_type (linear or ntk)",
        )
    if model.rope_scaling_type is not None and model.position != "rope":
        yield Conflict(
            ("model.rope_scaling_type", "model.position"),
            f'rope_scaling_type "{model.rope_scaling_type}" needs position "rope", not "{model.position}"',
        )


def _lengths(model: ModelConfig, data: DataConfig) -> Iterator[Conflict]:
    if model.n_positions is not None and model.n_positions < data.max_length:
        yield Conflict(
            ("model.n_positions", "data.max_length"),
            f"max_length {data.max_length} is longer than the model's n_positions {model.n_positions}",
        )


def _packing(data: DataConfig) -> Iterator[Conflict]:
    if data.overlap_size >= data.max_length:
        yield Conflict(
            ("data.overlap_size", "data.max_length"),
            f"overlap_size {data.overlap_size} must be smaller than max_length {data.max_length}",
        )
    if data.overlap_size and data.packing != "best_fit":
        yield Conflict(
            ("data.overlap_size", "data.packing"),
            f'overlap_size {data.overlap_size} needs packing "best_fit", not "{data.packing}"',
        )


def _curriculum(data: DataConfig) -> Iterator[Conflict]:
    for index, phase in enumerate(data.curriculum):
        path, duration = f"data.curriculum[{index}].mix", phase.duration_tokens
        negative = sorted(bucket for bucket, weight in phase.mix.items() if weight < 0)
        if negative:
            yield Conflict((path,), f"the weight of {', '.join(negative)} is negative", "weights are >= 0")
        elif sum(phase.mix.values()) <= 0:
            yield Conflict((path,), "the mix needs at least one bucket with a positive weight")
        # The last phase goes on as long as there are steps.
        if index + 1 < len(data.curriculum) and not round(duration / data.max_length):
            yield Conflict(
                (f"data.curriculum[{index}].duration_tokens", "data.max_length"),
                f"phase {index + 1} lasts {duration:,} tokens, half a row of max_length {data.max_length:,} or less: "
                "nothing would be read in it",
                "make it longer or leave it out",
            )


def _walltime(training: TrainingConfig) -> Iterator[Conflict]:
    budget, reserve = training.max_runtime_seconds, training.walltime_reserve_seconds
    if budget is not None and reserve >= budget:
        yield Conflict(
            ("training.max_runtime_seconds", "training.walltime_reserve_seconds"),
            f"walltime_reserve_seconds {reserve:g} leaves nothing of max_runtime_seconds {budget:g}",
        )
