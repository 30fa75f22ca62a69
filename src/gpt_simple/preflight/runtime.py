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

from gpt_simple.errors import ConfigError
from gpt_simple.hardware import find_gpu
from gpt_simple.model.flops import flops_per_token, parameter_count
from gpt_simple.preflight.environment import free_memory

if TYPE_CHECKING:
    from gpt_simple.preflight.preflight import Outlook

_PROBE_SECONDS, _PROBE_STEPS = 5.0, (3, 20)
_WRITING = 0.5e9
"""Bytes a second of a checkpoint, with its checksums: a disk of the middle sort."""


@frozen
class ThroughputEstimate:
    """Seconds of the ``steps_left`` by what they go to. ``basis`` says where the numbers come from.

    ``evaluation_seconds`` is None while the data are not prepared, since their validation split is not known then.
    """

    measured: bool
    basis: str
    tokens_per_second: float
    step_seconds: float
    first_step_seconds: float
    steps_left: int
    training_seconds: float
    evaluation_seconds: float | None
    saving_seconds: float

    @property
    def total_seconds(self) -> float:
        """From the first step to the last checkpoint."""
        stepping = self.first_step_seconds + self.training_seconds
        return stepping + (self.evaluation_seconds or 0.0) + self.saving_seconds

    def fields(self) -> dict[str, Any]:
        """The same for machines."""
        names = ("measured", "basis", "tokens_per_second", "step_seconds", "first_step_seconds", "steps_left")
        return {name: getattr(self, name) for name in (*names, "total_seconds")}


def look(outlook: Outlook) -> ThroughputEstimate | None:
    """Measure if a probe was asked for, else estimate for the named GPU; None if neither can be done."""
    if outlook.questions.probe:
        return _measured(outlook)
    return _estimated(outlook) if outlook.questions.device else None


def _measured(outlook: Outlook) -> ThroughputEstimate:
    """Make steps on this machine, as configured, on rows that are made up; nothing stays behind."""
    import torch

    from gpt_simple.engine.compile import compile_flags, plan
    from gpt_simple.engine.precision import resolve
    from gpt_simple.engine.process_state import process_as_found
    from gpt_simple.preflight.dry_run import DryRun

    config, training = outlook.config, outlook.config.training
    vocab_size = outlook.data.vocab_size
    if vocab_size is None:
        raise ConfigError("the vocabulary is not known before the data are prepared: prepare them, then probe")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wished = not outlook.is_default("training.compile")
    with process_as_found():
        precision = resolve(training.mixed_precision, device)
        compiling = plan(training, device, 1, wished=wished)
        _require_memory(outlook, vocab_size, precision.name, device, compiled=compiling.enabled)
        with compile_flags(compiling), _own_compiler_cache():
            dry_run = DryRun.prepare(config, outlook.registry, precision, vocab_size=vocab_size, compile_plan=compiling)
            first = _seconds(dry_run.step, device)
            steps = _repeat(dry_run.step, device)
            batch = 0.0
            if training.eval_steps:
                _seconds(dry_run.evaluate, device)
                batch = _seconds(dry_run.evaluate, device)
    step = statistics.median(steps)
    name = "fp32" if precision.name == "no" else precision.name
    compiled = ", compiled" if compiling.enabled else ""
    basis = f"measured: {len(steps)} steps here, {name}{compiled}; the first took {first:.1f} s"
    if outlook.questions.world_size > 1:
        basis += f"; {outlook.questions.world_size} processes without the time to talk to each other"
    return _extrapolated(outlook, True, basis, step, batch, first)


@contextmanager
def _own_compiler_cache() -> Iterator[None]:
    """What is compiled goes into a directory that is deleted afterwards."""
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


def _require_memory(outlook: Outlook, vocab_size: int, precision: str, device: Any, *, compiled: bool) -> None:
    """Refuse to probe what plainly does not fit into this machine, before it takes any of it."""
    import torch

    from gpt_simple.preflight.memory import predict_memory

    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else free_memory()
    # Weights, gradients and both moments are there whatever the compiler does; they take no time to know.
    needed = 16 * parameter_count(outlook.shape) if outlook.shape is not None else 0
    if free is not None and needed <= free and not compiled:
        needed = predict_memory(
            outlook.config,
            vocab_size=vocab_size,
            precision=precision,
            cuda=cuda,
            registry=outlook.registry,
        ).peak
    if free is not None and needed > free:
        raise ConfigError(
            f"the probe was not made: it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free here;"
            " lower per_device_batch_size, or probe on a larger machine"
        )


def _estimated(outlook: Outlook) -> ThroughputEstimate | None:
    try:
        gpu = find_gpu(outlook.questions.device or "")
    except ConfigError:
        return None  # the prediction of the memory says it
    shape, config, mfu = outlook.shape, outlook.config, outlook.questions.mfu
    peak = gpu.flops.get(gpu.precision)
    if peak is None or shape is None:
        return None
    rows, length = config.training.per_device_batch_size, config.data.max_length
    forward = flops_per_token(shape, length) / 3 * rows * length / (peak * mfu)
    # The backward pass costs two forward passes, and another one of the blocks whose activations are computed again.
    every = int(config.training.gradient_checkpointing)
    passes = 3 + (-(-shape.n_layer // every) / shape.n_layer if every else 0)
    step = passes * forward * config.training.gradient_accumulation_steps
    basis = f"an estimate: {mfu:.0%} of the {peak / 1e12:.0f} TFLOP/s of a {gpu.name}"
    return _extrapolated(outlook, False, basis, step, forward, 0.0)


def _extrapolated(
    outlook: Outlook, measured: bool, basis: str, step: float, batch: float, first: float
) -> ThroughputEstimate:
    """From the seconds of a step, of a batch of an evaluation and of the first step to what is left of the run."""
    config, training, world = outlook.config, outlook.config.training, outlook.questions.world_size
    done = min(outlook.done[0], training.max_steps)
    left, first = training.max_steps - done, first if done < training.max_steps else 0.0

    def events_left(every: int) -> int:
        return -(-training.max_steps // every) - done // every if left else 0

    evaluations = events_left(training.eval_steps) if training.eval_steps else 0
    batches = -(-outlook.data.val_rows // (training.per_device_batch_size * world))
    if training.max_eval_batches is not None:
        batches = min(batches, -(-training.max_eval_batches // world))
    saves = events_left(training.save_steps or training.max_steps)
    return ThroughputEstimate(
        measured=measured,
        basis=basis,
        tokens_per_second=outlook.rows_per_step * config.data.max_length / step,
        step_seconds=step,
        first_step_seconds=first,
        steps_left=left,
        training_seconds=step * (left - (1 if first else 0)),
        evaluation_seconds=evaluations * batches * batch if outlook.data.val_tokens is not None else None,
        saving_seconds=saves * (outlook.output.checkpoint_bytes or 0) / _WRITING,
    )


def _repeat(work: Any, device: Any) -> list[float]:
    """Seconds of each repetition: at least some, at most many, until enough time has passed."""
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
