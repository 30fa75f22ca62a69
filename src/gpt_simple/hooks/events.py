"""What a hook is told: one frozen class per hook.

Steps are counted from 1; ``step`` of an event is the optimizer step that it belongs to. ``tokens`` are
positions (rows x max_length over all processes since step 0), ``target_tokens`` those of them that are in the
loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from gpt_simple.config.frozen import frozen_dict

if TYPE_CHECKING:
    import torch

    from gpt_simple.hooks.batch import Batch

RunStatus = Literal["completed", "stopped", "halted"]


@frozen
class ModelBuilt:
    """The raw module is initialised on its device; checkpointing, compilation and wrapping come next."""

    model: torch.nn.Module


@frozen
class RunStart:
    """Everything is prepared and all state is restored; the next step is ``step + 1``.

    ``best_val_loss`` is the run's lowest ``eval/loss`` so far, in nats, None if there was no evaluation.
    """

    step: int
    max_steps: int
    tokens: int
    resumed_from: Path | None
    promise: str
    best_val_loss: float | None
    facts: Mapping[str, Any] = field(converter=frozen_dict)


@frozen
class StepStart:
    """The optimizer step ``step`` is about to be made."""

    step: int


@frozen
class BatchReady:
    """Micro-batch ``micro_batch`` (from 0) of the step is on the device, before its forward."""

    step: int
    micro_batch: int
    batch: Batch


@frozen
class GradientsReady:
    """Gradients are reduced and unscaled; clipping and the optimizer come next. ``p.grad`` may be edited."""

    step: int


@frozen
class StepEnd:
    """The step is made and its data position is committed. ``is_last``: the run ends with it."""

    step: int
    tokens: int
    target_tokens: int
    is_last: bool


@frozen
class CollectMetrics:
    """A logging boundary. Totals are over all processes and since the previous boundary.

    ``train_seconds`` leaves evaluation, checkpoints and the first step of the process (compilation) out of
    ``wall_seconds``; ``timed_steps`` and ``timed_tokens`` are what was done in them.
    """

    step: int
    steps: int
    tokens: int
    target_tokens: int
    timed_steps: int
    timed_tokens: int
    train_seconds: float
    wall_seconds: float
    data_seconds: float


@frozen
class MetricsReady:
    """The metrics of a logging boundary as plain floats, reduced over all processes."""

    step: int
    tokens: int
    metrics: Mapping[str, float] = field(converter=frozen_dict)


@frozen
class Evaluate:
    """An evaluation is due. The engine has set eval mode, no_grad, autocast and an RNG of its own."""

    step: int


@frozen
class EvalEnd:
    """Reduced metrics of an evaluation."""

    step: int
    tokens: int
    metrics: Mapping[str, float] = field(converter=frozen_dict)
    seconds: float


@frozen
class CheckpointSaving:
    """A checkpoint of this step has been agreed on and will be written next."""

    step: int
    reason: str


@frozen
class CheckpointSaved:
    """The checkpoint is durable: it survives a crash from here on."""

    step: int
    path: Path
    seconds: float
    bytes: int
    reason: str


@frozen
class CheckpointLoaded:
    """All state of the engine is restored from this checkpoint."""

    step: int
    path: Path


@frozen
class LogRecord:
    """Something worth a line happened: ``name`` says what in a word, ``fields`` hold it for machines."""

    level: Literal["info", "warning", "error"]
    message: str
    step: int
    name: str
    fields: Mapping[str, Any] = field(factory=dict, converter=frozen_dict)


@frozen
class RunEnd:
    """The run has ended by itself: completed, stopped (resumable) or halted.

    ``summary`` is what summary.json holds.
    """

    status: RunStatus
    step: int
    tokens: int
    reason: str
    summary: Mapping[str, Any] = field(converter=frozen_dict)


@frozen
class RunError:
    """The run ends with an exception. No collectives from here on."""

    error: BaseException
    step: int


@frozen
class Close:
    """Release what the plugin holds. Always called, once, in reverse order. No collectives."""

    ok: bool
