"""How long a run takes: measured by a few real steps, or estimated from its arithmetic for a named GPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from attrs import frozen

from gpt_simple.config.schema import Config
from gpt_simple.data.plan import BatchPlan
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.errors import ConfigError, OutOfMemory
from gpt_simple.hardware import find_gpu, free_memory
from gpt_simple.hooks.components import Registry
from gpt_simple.hooks.preflight import InspectedData, PreflightOptions, ThroughputEstimate
from gpt_simple.machine_failures import explained_machine_failures
from gpt_simple.model.flops import flops_per_token, parameter_count
from gpt_simple.model.shape import Shape

if TYPE_CHECKING:
    from gpt_simple.engine.precision import Precision

_PROBE_SECONDS, _PROBE_STEPS = 5.0, (3, 20)
_WRITING = 0.5e9
"""Bytes a second of a checkpoint, with its checksums, on an average disk."""


@frozen
class _Timing:
    """Seconds of a step, of an evaluation's batch and of the first step. ``basis`` says where they come from."""

    measured: bool
    basis: str
    step: float
    evaluation_batch: float
    first_step: float = 0.0


def estimate_runtime(
    config: Config,
    registry: Registry,
    options: PreflightOptions,
    *,
    data: InspectedData,
    shape: Shape | None,
    plan: BatchPlan,
    checkpoint_bytes: int | None,
    compile_is_explicit: bool,
) -> ThroughputEstimate | None:
    """Measure if ``options`` ask for a probe, else estimate for the named GPU; None if neither is possible."""
    timing: _Timing | None = None
    if options.probe:
        timing = _measured(config, registry, options, data.vocab_size, shape, compile_is_explicit=compile_is_explicit)
    elif options.device and shape is not None:
        timing = _estimated(config, options.device, options.mfu, shape)
    if timing is None:
        return None
    return _extrapolated(timing, config, options.world_size, data, plan, checkpoint_bytes or 0)


def _measured(
    config: Config,
    registry: Registry,
    options: PreflightOptions,
    vocab_size: int | None,
    shape: Shape | None,
    *,
    compile_is_explicit: bool,
) -> _Timing:
    """Make steps on this machine, as configured, on synthetic rows; nothing stays behind."""
    import torch

    from gpt_simple.engine.compile import compile_flags, plan, refuse_graphs
    from gpt_simple.engine.precision import resolve
    from gpt_simple.engine.process_state import preserved_process_state
    from gpt_simple.preflight.dry_run import DryRun

    if vocab_size is None:
        raise ConfigError("the vocabulary is not known before the data are prepared: prepare them, then probe")
    training = config.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with preserved_process_state(), _refused_without_memory():
        precision = resolve(training.mixed_precision, device)
        compiling = plan(training, device, 1, explicit=compile_is_explicit)
        refuse_graphs(config, compiling)
        _require_memory(config, registry, vocab_size, shape, precision, compiled=compiling.enabled)
        with compile_flags(compiling), _own_compiler_cache():
            dry_run = DryRun.prepare(config, registry, precision, vocab_size=vocab_size, compile_plan=compiling)
            first = _seconds(dry_run.step, device)
            steps = _repeat(dry_run.step, device)
            batch = 0.0
            if training.eval_steps:
                _seconds(dry_run.evaluate, device)
                batch = _seconds(dry_run.evaluate, device)
    name = "fp32" if precision.name == "no" else precision.name
    compiled = ", compiled" if compiling.enabled else ""
    basis = f"measured: {len(steps)} steps here, {name}{compiled}; the first took {first:.1f} s"
    if options.world_size > 1:
        basis += f"; {options.world_size} processes without the time of their communication"
    return _Timing(True, basis, statistics.median(steps), batch, first)


@contextmanager
def _refused_without_memory() -> Iterator[None]:
    """Raise ConfigError if memory is used up within, as _require_memory does for what is known before."""
    try:
        with explained_machine_failures():
            yield
    except OutOfMemory as error:
        advice = "lower per_device_batch_size, or probe on a larger machine"
        raise ConfigError(f"the probe was not made: {error}", hint=advice) from error


@contextmanager
def _own_compiler_cache() -> Iterator[None]:
    """Compile into a directory that is deleted afterwards."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ[name] for name in names if name in os.environ}
    with TemporaryDirectory(prefix="gpt-simple-probe-") as cache:
        os.environ.update({name: str(Path(cache, name)) for name in names})
        try:
            yield
        finally:
            for name in names:
                del os.environ[name]
            os.environ.update(before)


def _require_memory(
    config: Config, registry: Registry, vocab_size: int, shape: Shape | None, precision: Precision, *, compiled: bool
) -> None:
    """Refuse to probe what plainly does not fit into this machine, before anything is allocated."""
    import torch

    from gpt_simple.preflight.memory import predict_memory

    cuda = precision.device.type == "cuda"
    free = torch.cuda.mem_get_info(precision.device)[0] if cuda else free_memory()
    if free is None:
        return
    # Weights, gradients and both moments, which are needed whatever the compiler does.
    needed = 16 * parameter_count(shape) if shape is not None else 0
    if needed <= free and not compiled:
        prediction = predict_memory(
            config, vocab_size=vocab_size, precision=precision.name, cuda=cuda, registry=registry
        )
        needed = prediction.peak
    if needed > free:
        raise ConfigError(
            f"the probe was not made: it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free here;"
            " lower per_device_batch_size, or probe on a larger machine"
        )


def _estimated(config: Config, device: str, mfu: float, shape: Shape) -> _Timing | None:
    """The times of the model's arithmetic on the named GPU; None if that one's speed is unknown."""
    try:
        gpu = find_gpu(device)
    except ConfigError:
        return None  # the forecast of the memory refuses it
    if (peak := config.training.peak_flops or gpu.flops.get(gpu.precision)) is None:
        return None
    rows, length = config.training.per_device_batch_size, config.data.max_length
    forward = flops_per_token(shape, length) / 3 * rows * length / (peak * mfu)
    # The backward pass costs two forward passes, and another one of the blocks whose activations are computed again.
    interval = int(ActivationCheckpointing.of(config).setting)
    passes = 3 + (-(-shape.n_layer // interval) / shape.n_layer if interval else 0)
    basis = f"an estimate: {mfu:.0%} of the {peak / 1e12:.0f} TFLOP/s of a {gpu.name}"
    return _Timing(False, basis, passes * forward * config.training.gradient_accumulation_steps, forward)


def _extrapolated(
    timing: _Timing, config: Config, world_size: int, data: InspectedData, plan: BatchPlan, checkpoint_bytes: int
) -> ThroughputEstimate:
    """The seconds of the steps that are left, each by its tokens. The timing is of a step after the warm-up stages."""
    training = config.training
    done = min(plan.step, training.max_steps)
    left, first = training.max_steps - done, timing.first_step if done < training.max_steps else 0.0
    rows_per_batch, tokens_per_step = training.per_device_batch_size * world_size, plan.stages[-1].tokens
    tokens_left = plan.tokens_between(done + (1 if first else 0), training.max_steps)

    def events_left(every: int) -> int:
        return -(-training.max_steps // every) - done // every if left else 0

    evaluations = events_left(training.eval_steps) if training.eval_steps else 0
    batches = -(-data.val_rows // rows_per_batch)
    if training.max_eval_batches is not None:
        batches = min(batches, -(-training.max_eval_batches // world_size))
    evaluating = evaluations * batches * timing.evaluation_batch
    saves = events_left(training.save_steps or training.max_steps)
    return ThroughputEstimate(
        measured=timing.measured,
        basis=timing.basis,
        tokens_per_second=tokens_per_step / timing.step,
        step_seconds=timing.step,
        first_step_seconds=first,
        steps_left=left,
        training_seconds=timing.step * tokens_left / tokens_per_step,
        evaluation_seconds=evaluating if data.val_tokens is not None else None,
        saving_seconds=saves * checkpoint_bytes / _WRITING,
    )


def _repeat(work: Any, device: Any) -> list[float]:
    """Seconds of each repetition, whose number _PROBE_STEPS and _PROBE_SECONDS limit."""
    fewest, most = _PROBE_STEPS
    times: list[float] = []
    while len(times) < fewest or (len(times) < most and sum(times) < _PROBE_SECONDS):
        times.append(_seconds(work, device))
    return times


def _seconds(work: Any, device: Any) -> float:
    import torch

    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
