"""The step loop: one optimizer step, then metrics, one decision of all ranks, checkpoint, evaluation, stop."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from attrs import define, field, frozen

from gpt_simple.data.loader import DataExhausted
from gpt_simple.distributed.metric_reduction import MetricReducer
from gpt_simple.engine.checkpointer import Checkpointer
from gpt_simple.engine.control import Control, Decision
from gpt_simple.engine.gradients import UneditedNorm
from gpt_simple.engine.loss_monitor import NOT_FINITE, LossMonitor, causes_of_skips, not_finite_on
from gpt_simple.engine.metrics import MetricBuffer, StepTimer, namespaced, resolve_name_collisions
from gpt_simple.engine.step import TrainStep
from gpt_simple.engine.stop_signals import StopNow, StopSignals
from gpt_simple.engine.time_budget import TimeBudget
from gpt_simple.engine.views import EvaluationAbandoned, RunView
from gpt_simple.errors import PluginError
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.events import (
    BatchReady,
    EvalEnd,
    Evaluate,
    GradientsReady,
    MetricsReady,
    RunStatus,
    StepEnd,
    StepStart,
)
from gpt_simple.hooks.results import VAL_LOSS
from gpt_simple.plugin_host.dispatch import Calls

_UNLOGGED = 100
"""Steps after which the device is read when nothing is logged: too many skipped steps must halt the run."""


@frozen
class FitResult:
    """How the loop ended. ``rates``: tokens per second of each logging interval."""

    status: RunStatus
    reason: str
    last_train: Mapping[str, float]
    last_eval: Mapping[str, float]
    rates: tuple[float, ...]


@define(slots=False, eq=False)
class Trainer:
    """A prepared run. ``fit`` runs its steps to the end of the run, a stop or a halt.

    ``after_first_update`` may refuse what a checkpoint will need, before hours of training depend on it.
    """

    run: RunView
    calls: Calls
    train_step: TrainStep
    control: Control
    checkpointer: Checkpointer
    signals: StopSignals
    time_budget: TimeBudget | None
    after_first_update: Callable[[], object]
    _last_train: Mapping[str, float] = field(factory=dict, init=False)
    _last_eval: Mapping[str, float] = field(factory=dict, init=False)
    _rates: list[float] = field(factory=list, init=False)
    _buffer: MetricBuffer = field(factory=MetricBuffer, init=False)
    _timer: StepTimer = field(factory=StepTimer, init=False)
    _first_step: bool = field(default=True, init=False)

    def __attrs_post_init__(self) -> None:
        self._max_steps = self.run.config.training.max_steps
        self._reducer = MetricReducer(self.run.dist)
        listeners = self.calls.plugins("on_gradients")
        self._may_skip = tuple(plugin.name for plugin in listeners)
        # A plugin that reads the norm after another one would find edited gradients.
        self._norm_first = any(plugin.names("grad_norm") for plugin in listeners[1:])
        self._no_skip = torch.zeros((), device=self.run.device)
        self._loss_monitor = LossMonitor(self.run.config.training.max_skipped_steps)

    def fit(self) -> FitResult:
        """Run steps until the run is over."""
        try:
            status, reason = self._fit()
        except StopNow as stop:
            status, reason = "stopped", str(stop)
        return FitResult(status, reason, self._last_train, self._last_eval, tuple(self._rates))

    def _fit(self) -> tuple[RunStatus, str]:
        self.run.model.train()
        self._refuse_untrained()
        if (decision := self._decide()).should_stop:
            return self._stopped(decision)
        if self.run.world_size > 1:
            self.train_step.warm_up_ddp(self._zero_batch())
        self._timer = StepTimer(waited_before=self.run.loader.wait_seconds)
        while self.run.step < self._max_steps:
            try:
                self._step(is_last=self.run.step + 1 == self._max_steps)
            except DataExhausted as exhausted:
                return self._out_of_data(str(exhausted))
            decision = self._boundary(is_last=self.run.step == self._max_steps)
            if decision.should_stop:
                return self._stopped(decision)
        return "completed", f"finished all {self._max_steps} steps"

    def _refuse_untrained(self) -> None:
        """Raise PluginError if a plugin has changed which parameters the model has or trains, which has no effect."""
        if lines := self.train_step.not_trained():
            others = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
            raise PluginError(
                f"a plugin changed the model after it was prepared for training: {'; '.join(lines[:3])}{others}",
                hint="change, freeze and unfreeze parameters in on_model_built",
            )

    def _zero_batch(self) -> Batch:
        training, data = self.run.config.training, self.run.config.data
        zeros = torch.zeros(training.per_device_batch_size, data.max_length, dtype=torch.int64, device=self.run.device)
        extra = zeros if data.document_mask else None
        return Batch(zeros, zeros, extra, extra, first_sample=0, targets=zeros.numel())

    def _step(self, is_last: bool) -> None:
        """One optimizer step over all its micro-batches, with the hooks around it."""
        run, calls, state = self.run, self.calls, self.run.state
        step = state.step + 1
        started = time.perf_counter()
        data = run.loader.next_step()
        if calls.on_step_start is not None:
            calls.on_step_start(run, StepStart(step))
        result = self.train_step(
            step,
            data.batches,
            data.targets,
            on_batch=self._on_batch if calls.on_batch is not None else None,
            on_gradients=partial(self._on_gradients, data.targets) if calls.on_gradients is not None else None,
            before_update=self.signals.defer if self._first_step else None,
        )
        state.advance(data.tokens, data.targets)
        self._buffer.add(step, data, result)
        self._timer.step(data.tokens, data.targets)
        if self._first_step:
            self.after_first_update()
            # The step compiles and warms caches up: it is no part of throughput.
            self._first_step = False
            self._synchronize()
            self._timer.exclude_step(time.perf_counter() - started, data.tokens)
        elif self.time_budget is not None:
            self.time_budget.record_step(time.perf_counter() - started)
        if calls.on_step_end is not None:
            calls.on_step_end(
                run,
                StepEnd(
                    step,
                    state.tokens,
                    state.target_tokens,
                    is_last,
                    partial(self._mean_loss, result.loss, data.targets),
                    result.learning_rate,
                    result.norm,
                    partial(torch.gt, result.skipped, 0),
                    partial(self._skipped_by, result.requests),
                ),
            )

    def _on_batch(self, index: int, batch: Batch) -> None:
        if (call := self.calls.on_batch) is not None:
            call(self.run, BatchReady(self.run.step + 1, index, batch))

    def _on_gradients(self, targets: int, loss: torch.Tensor, rate: float, norm: UneditedNorm) -> torch.Tensor:
        """The plugins' requests to skip the step: for each of ``_may_skip`` 1.0 or 0.0."""
        if self._norm_first:
            norm()
        if (call := self.calls.on_gradients) is not None:
            mean = partial(self._mean_loss, loss, targets)
            with self.run.comm.during("on_gradients"):
                call(self.run, GradientsReady(self.run.step + 1, mean, rate, norm))
        flags = self.run.control.take_skips()
        none = self._no_skip
        return torch.stack([none + flags[name] if name in flags else none for name in self._may_skip])

    def _mean_loss(self, nats: torch.Tensor, targets: int) -> torch.Tensor:
        """Nats per target token, of this process's share of the step's targets."""
        return nats * (self.run.world_size / max(1, targets))

    def _skipped_by(self, requests: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {} if requests is None else dict(zip(self._may_skip, requests > 0, strict=True))

    def _synchronize(self) -> None:
        """Wait for the device, so that the time of queued steps does not count for what follows them."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def _boundary(self, is_last: bool) -> Decision:
        """After a step, always in this order: metrics, one decision, checkpoint, evaluation, stop."""
        step, every = self.run.step, self.run.config.training.logging_steps
        logs = is_last or step % (every or _UNLOGGED) == 0
        if logs:
            self._log(notify=bool(every))
            with self._timer.paused():
                self.checkpointer.poll(wait=False)
        decision = self._decide()
        retry = "the one before could not be written" if logs and self.checkpointer.retry_due else ""
        if decision.save or decision.should_stop or is_last or retry:
            reason = "last step" if is_last else decision.stop or decision.halt or decision.save
            if not_finite := self._save(reason or retry, blocking=decision.should_stop or is_last):
                return Decision(halt=not_finite)
        if decision.evaluate and not decision.should_stop:
            self._evaluate()
        return decision

    def _decide(self) -> Decision:
        decision = self.control.decide()
        for name, message in zip(decision.disabled_plugins, decision.failures, strict=True):
            self.calls.disable(name)
            if message:
                self.run.log.warning(message, name="plugin_failed", plugin=name)
        return decision

    def _log(self, *, notify: bool) -> None:
        """Read the interval's metrics in one device read and one collective, and hand them to the plugins."""
        run, calls, step = self.run, self.calls, self.run.step
        self._refuse_untrained()
        # Read first: this waits for the steps in the device's queue, and their time counts.
        metrics, records = self._buffer.read(self.train_step.schedule(step), run.world_size)
        split, self._timer = self._timer.split(step, run.loader.wait_seconds)
        if notify and calls.collect_metrics is not None:
            with run.comm.during("collect_metrics"):
                metrics |= namespaced(calls.collect_metrics(run, split))
        metrics["train/not_finite_on"] = not_finite_on(records, run.rank)
        floats = resolve_name_collisions(self._reducer.reduce(metrics), self.control.plugins)
        rank = floats.pop("train/not_finite_on")
        where = f"; the loss was not finite in process {rank:.0f}" if run.world_size > 1 and rank < math.inf else ""
        skipped = floats.pop("train/skipped_steps")
        if skipped:
            floats["train/skipped_steps"] = skipped
            for cause, count in causes_of_skips(records, self._may_skip).items():
                message = f"{count} of the last {split.steps} steps {cause}{where if cause == NOT_FINITE else ''}"
                run.log.warning(message, name="skipped_steps", count=count)
        if spike := self._loss_monitor.spike(records):
            at, loss = spike.record.step, spike.record.loss
            run.log.warning(str(spike), name="loss_spike", at=at, loss=loss, usual=spike.usual)
        if streak := self._loss_monitor.streak(records):
            run.control.halt(streak + where)
        self._last_train = floats
        if split.timed_steps and split.train_seconds > 0:
            self._rates.append(split.timed_tokens / split.train_seconds)
        self._update_status()
        if notify and calls.on_metrics is not None:
            calls.on_metrics(run, MetricsReady(step, run.tokens, floats))

    def _evaluate(self) -> None:
        """Run the plugins' evaluations. A stop that arrives meanwhile abandons them."""
        run, calls, state = self.run, self.calls, self.run.state
        if calls.evaluate is None:
            return
        self._synchronize()
        with self._timer.paused():
            started = time.perf_counter()
            try:
                with run.evaluating(), run.comm.during("evaluate"):
                    metrics = namespaced(calls.evaluate(run, Evaluate(state.step)))
            except EvaluationAbandoned:
                run.log.info("evaluation abandoned: the run is stopping", name="evaluation_abandoned")
                return
            floats = resolve_name_collisions(self._reducer.reduce(metrics), self.control.plugins)
            self._last_eval = floats
            if (loss := floats.get(VAL_LOSS)) is not None and math.isfinite(loss):
                state.record_val_loss(loss)
                self.checkpointer.run_dir.record_val_loss(state.step, loss)
            if calls.on_eval_end is not None:
                seconds = time.perf_counter() - started
                calls.on_eval_end(run, EvalEnd(state.step, state.tokens, floats, seconds))

    def _save(self, reason: str, *, blocking: bool) -> str:
        """Save this step. Returns why the run must halt, or an empty string."""
        self._synchronize()
        with self._timer.paused():
            return self.checkpointer.save(reason, blocking=blocking)

    def _stopped(self, decision: Decision) -> tuple[RunStatus, str]:
        if decision.halt:
            return "halted", decision.halt
        if self.run.step == self._max_steps:
            reason = f"finished all {self._max_steps} steps; the last evaluation was left out: {decision.stop}"
            return "completed", reason
        return "stopped", decision.stop

    def _out_of_data(self, reason: str) -> tuple[RunStatus, str]:
        """The data ended before ``max_steps``: the run is complete, as after its last step."""
        if self._buffer:
            self._log(notify=True)
        if not_finite := self._save(reason, blocking=True):
            return "halted", not_finite
        if self.run.config.training.eval_steps:
            self._evaluate()
        return "completed", reason

    def _update_status(self) -> None:
        # Of the latest intervals only: the list grows with the run.
        rate = statistics.median(self._rates[-15:]) if self._rates else None
        left = (self._max_steps - self.run.step) * self.run.known["tokens_per_step"]
        self.checkpointer.run_dir.status.update(
            state="running",
            step=self.run.step,
            max_steps=self._max_steps,
            loss=self._last_train.get("train/loss"),
            tokens_per_second=rate,
            eta_seconds=left / rate if rate else None,
        )
