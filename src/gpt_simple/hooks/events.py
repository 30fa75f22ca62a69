"""The events that hooks receive: one frozen class per hook.

Steps are counted from 1; ``step`` of an event is the optimizer step that it belongs to. ``tokens`` are positions (rows
x max_length over all processes since step 0), ``target_tokens`` those of them that are in the loss.
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

Unread = Any
"""A value of an event, or the function that computes it: a tensor that nobody reads costs the device nothing."""


def _computed(value: Any) -> torch.Tensor:
    return value() if callable(value) else value  # type: ignore[no-any-return]


@frozen
class ModelBuilt:
    """``model`` is the raw module on its device. Its structure is final after this hook, its values later.

    ``step`` is the last finished step: 0 in a new run, that of the checkpoint in a run that resumes.
    """

    model: torch.nn.Module
    step: int = 0


@frozen
class OptimizerBuilt:
    """``optimizer`` is the raw one, as its component has built it. ``step`` is the last finished step."""

    optimizer: torch.optim.Optimizer
    step: int = 0


@frozen
class RunStart:
    """The next step is ``step + 1``.

    ``resumed_from`` is the checkpoint, None in a new run. ``promise`` is the resume guarantee: ``from scratch``,
    ``bit-exact``, ``order-exact: ...`` or ``changed: ...``. ``best_val_loss`` is the run's lowest ``eval/loss`` so far,
    in nats per target token, None if there was no evaluation. ``facts`` are those of ``run.facts()``.
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
    """Optimizer step ``step`` comes next."""

    step: int


@frozen
class BatchReady:
    """Micro-batch ``micro_batch`` (from 0) of the step. ``batch`` is a copy, to be read only."""

    step: int
    micro_batch: int
    batch: Batch


@frozen
class GradientsReady:
    """Optimizer step ``step`` is about to use the gradients, which are ``p.grad`` of the model's parameters.

    ``learning_rate`` is the schedule's rate of this step. ``loss`` and ``grad_norm`` are 0-d tensors on the device,
    computed when they are read.
    """

    step: int
    _loss: Unread = field(default=None, alias="loss", repr=False, eq=False)
    learning_rate: float = 0.0
    _grad_norm: Unread = field(default=None, alias="grad_norm", repr=False, eq=False)

    @property
    def loss(self) -> torch.Tensor:
        """Nats of this process's rows, divided by its share of the step's target tokens (all, over ``world_size``).

        The mean over the processes is the loss of the step: ``run.comm.sum(event.loss) / run.world_size``.
        """
        return _computed(self._loss)

    @property
    def grad_norm(self) -> torch.Tensor:
        """The L2 norm of all gradients before any plugin's edit, the same on every process. Read it before you edit."""
        return _computed(self._grad_norm)


@frozen
class StepEnd:
    """Totals after the step. ``is_last``: it is step ``training.max_steps``.

    ``learning_rate`` is the schedule's rate of this step. The other facts of the step are 0-d tensors on the device.
    """

    step: int
    tokens: int
    target_tokens: int
    is_last: bool
    _loss: Unread = field(default=None, alias="loss", repr=False, eq=False)
    learning_rate: float = 0.0
    _grad_norm: Unread = field(default=None, alias="grad_norm", repr=False, eq=False)
    _skipped: Unread = field(default=None, alias="skipped", repr=False, eq=False)
    _skipped_by: Any = field(default=frozen_dict({}), alias="skipped_by", repr=False, eq=False)

    @property
    def loss(self) -> torch.Tensor:
        """As ``GradientsReady.loss``."""
        return _computed(self._loss)

    @property
    def grad_norm(self) -> torch.Tensor:
        """The L2 norm of all gradients after every plugin's edit and before clipping, the same on every process."""
        return _computed(self._grad_norm)

    @property
    def skipped(self) -> torch.Tensor:
        """Whether the weights were left unchanged (bool): a gradient was not finite, or a plugin asked for it."""
        return _computed(self._skipped)

    @property
    def skipped_by(self) -> Mapping[str, torch.Tensor]:
        """For each plugin with ``on_gradients`` whether it asked to skip the step, on any process (bool)."""
        flags = self._skipped_by
        return frozen_dict(flags() if callable(flags) else flags)


@frozen
class CollectMetrics:
    """A logging boundary. Totals are over all processes and since the previous boundary.

    ``train_seconds`` is ``wall_seconds`` without evaluation, checkpoints and the first step of the process with rows of
    a length (compilation); ``timed_steps`` and ``timed_tokens`` are the steps and tokens in that time, ``timed_flops``
    the model's floating-point operations, 0 if it does not count them. ``data_seconds`` is the time spent waiting for
    data.
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
    timed_flops: float = 0.0


@frozen
class MetricsReady:
    """The metrics of a logging boundary by name, as plain floats, reduced over all processes."""

    step: int
    tokens: int
    metrics: Mapping[str, float] = field(converter=frozen_dict)


@frozen
class Evaluate:
    """The evaluation after ``step``."""

    step: int


@frozen
class EvalEnd:
    """The metrics of an evaluation by name, as plain floats, reduced over all processes."""

    step: int
    tokens: int
    metrics: Mapping[str, float] = field(converter=frozen_dict)
    seconds: float


@frozen
class CheckpointSaving:
    """A checkpoint of this step comes next; ``reason`` says why."""

    step: int
    reason: str


@frozen
class CheckpointSaved:
    """A durable checkpoint: the directory ``path`` of ``bytes`` bytes, written in ``seconds``.

    ``val_loss`` is the ``eval/loss`` of its step in nats per target token, None where that is unknown or not finite: a
    checkpoint is saved before its step is evaluated, unless ``training.save_after_eval`` is set or it is written in the
    background.
    """

    step: int
    path: Path
    seconds: float
    bytes: int
    reason: str
    val_loss: float | None = None


@frozen
class CheckpointLoaded:
    """The checkpoint that the run continues from. ``weight_sets``: the names of those that it had and are restored."""

    step: int
    path: Path
    weight_sets: tuple[str, ...] = ()


@frozen
class LogRecord:
    """One line of the log: ``message`` for people, ``name`` (a word) and ``fields`` for machines."""

    level: Literal["info", "warning", "error"]
    message: str
    step: int
    name: str
    fields: Mapping[str, Any] = field(factory=dict, converter=frozen_dict)


@frozen
class RunEnd:
    """The end of a run without an error. ``summary`` is the content of summary.json."""

    status: RunStatus
    step: int
    tokens: int
    reason: str
    summary: Mapping[str, Any] = field(converter=frozen_dict)


@frozen
class RunError:
    """The exception that ends the run."""

    error: BaseException
    step: int


@frozen
class Close:
    """``ok``: the run ends without an exception."""

    ok: bool
