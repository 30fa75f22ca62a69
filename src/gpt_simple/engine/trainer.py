"""The step loop: one optimizer step, then metrics, one decision of all ranks, checkpoint, evaluation, stop."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from attrs import define, evolve, field, frozen

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
    """How the loop ended. ``rates``: tokens per second of each logging interval.

    ``data_ended``: there are no more data, which is why the run is complete.
    """

    status: RunStatus
    reason: str
    last_train: Mapping[str, float]
    last_eval: Mapping[str, float]
    rates: tuple[float, ...]
    data_ended: bool


@define(slots=False, eq=False)
class Trainer:
    """A prepared run. ``fit`` runs its steps to the end of the run, a stop or a halt.

    ``rebuild`` makes the optimizer, and all that depends on which parameters are trained, anew for a reason.
    ``after_first_update`` may refuse what a checkpoint will need, before hours of training depend on it.
    """

    run: RunView
    calls: Calls
    train_step: TrainStep
    control: Control
    checkpointer: Checkpointer
    signals: StopSignals
    time_budget: TimeBudget | None
    rebuild: Callable[[str], None]
    after_first_update: Callable[[], object]
    _last_train: Mapping[str, float] = field(factory=dict, init=False)
    _last_eval: Mapping[str, float] = field(factory=dict, init=False)
    _rates: list[float] = field(factory=list, init=False)
    _buffer: MetricBuffer = field(factory=MetricBuffer, init=False)
    _timer: StepTimer = field(factory=StepTimer, init=False)
    _lengths: set[int] = field(factory=set, init=False)
    """Lengths of the rows of all steps with this optimizer so far: each is compiled once."""
    _evaluated: int = field(default=-1, init=False)
    """The step of the last evaluation."""
    _data_ended: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._max_steps = self.run.config.training.max_steps
        self._saves_after_eval = self.run.config.training.save_after_eval
        self._plan = self.run.loader.plan
        flops: Callable[[int], float] | None = getattr(self.run.guarded, "flops_per_token", None)
        self._flops = {stage.length: flops(stage.length) for stage in self._plan.stages} if flops is not None else {}
        self._reducer = MetricReducer(self.run.dist)
        listeners = self.calls.plugins("on_gradients")
        self._may_skip = tuple(plugin.name for plugin in listeners)
        # A plugin that reads the norm after another one would find edited gradients. Of sharded gradients all ranks
        # compute it together, whichever of them read it.
        others = listeners if self.run.dist.shards else listeners[1:]
        self._norm_first = any(plugin.names("grad_norm") for plugin in others)
        self._no_skip = torch.zeros((), device=self.run.device)
        self._loss_monitor = LossMonitor(self.run.config.training.max_skipped_steps)

    def fit(self) -> FitResult:
        """Run steps until the run is over."""
        try:
            status, reason = self._fit()
        except StopNow as stop:
            status, reason = "stopped", str(stop)
        return FitResult(status, reason, self._last_train, self._last_eval, tuple(self._rates), self._data_ended)

    def _fit(self) -> tuple[RunStatus, str]:
        self.run.guarded.train()
        self.run.watch.start(self.run)
        decision = self._decide()
        self._refuse_untrained()
        if decision.finish and not decision.halt:
            decision = self._boundary(is_last=False)
        elif not decision.should_stop:
            decision = self._run_steps()
        return self._outcome(decision)

    def _run_steps(self) -> Decision:
        """Run steps until a decision ends the run or all steps are finished. Returns the last decision."""
        self._warm_up()
        self._timer = StepTimer(waited_before=self.run.loader.wait_seconds)
        if self._saves_after_eval and self.run.state.evaluation_due:
            due = Decision(evaluate="the launch before left it out")
            if (decision := self._evaluate_and_save(due, is_last=False)).should_stop:
                return decision
        while self.run.step < self._max_steps:
            try:
                self._step(is_last=self.run.step + 1 == self._max_steps)
            except DataExhausted as exhausted:
                self._data_ended = True
                self.run.control.finish(str(exhausted))
            decision = self._boundary(is_last=self.run.step == self._max_steps)
            if decision.should_stop:
                break
        return decision

    def _refuse_untrained(self, *, failed: bool = False) -> None:
        """Raise PluginError if a plugin has changed which parameters the model has or trains, which has no effect."""
        if lines := self.train_step.not_trained(failed=failed):
            others = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
            raise PluginError(
                f"a plugin changed the model after it was prepared for training: {'; '.join(lines[:3])}{others}",
                hint="change, freeze and unfreeze parameters in on_model_built, or ask for"
                " run.control.rebuild_optimizer after it",
            )

    def _warm_up(self) -> None:
        if self.run.world_size > 1 and not self.run.dist.shards:
            self.train_step.warm_up_ddp(self._zero_batch())

    def _zero_batch(self) -> Batch:
        """A batch of the shape of the next step's."""
        stage = self._plan.stage(self.run.step + 1)
        zeros = torch.zeros(stage.rows, stage.length, dtype=torch.int64, device=self.run.device)
        extra = zeros if self.run.config.data.document_mask else None
        return Batch(zeros, zeros, extra, extra, first_sample=0, targets=zeros.numel())

    def _step(self, is_last: bool) -> None:
        """One optimizer step over all its micro-batches, with the hooks around it."""
        run, calls, state = self.run, self.calls, self.run.state
        step = state.step + 1
        length, is_first = self._plan.stage(step).length, not self._lengths
        # A step with rows of a new length compiles and warms caches up: it is no part of throughput.
        if is_new := length not in self._lengths:
            self._lengths.add(length)
            self._synchronize()
        started = time.perf_counter()
        data = run.loader.next_step()
        if calls.on_step_start is not None:
            calls.on_step_start(run, StepStart(step))
        try:
            result = self.train_step(
                step,
                data.batches,
                data.targets,
                on_batch=self._on_batch if calls.on_batch is not None else None,
                on_gradients=partial(self._on_gradients, data.targets) if calls.on_gradients is not None else None,
                before_update=self.signals.defer if is_first else None,
            )
        except RuntimeError:
            self._refuse_untrained(failed=True)  # a change of what is trained may fail in torch first
            raise
        state.advance(data.tokens, data.targets)
        self._buffer.add(step, data, result)
        flops = self._flops.get(length, 0.0) * data.tokens
        self._timer.step(data.tokens, data.targets, flops)
        if is_first:
            self.after_first_update()
        if is_new:
            self._synchronize()
            self._timer.exclude_step(time.perf_counter() - started, data.tokens, flops)
        if self.time_budget is not None:
            growth = self._plan.stage(step + 1).tokens / data.tokens
            self.time_budget.record_step(0.0 if is_new else time.perf_counter() - started, growth)
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
        self._meet()
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def _meet(self) -> None:
        """Wait for the other processes, before a wait for the device: that has no end if one of them hangs."""
        if self.run.device.type == "cuda":
            self.run.dist.barrier()

    def _boundary(self, is_last: bool) -> Decision:
        """After a step, always in this order: metrics, one decision, checkpoint, evaluation, stop.

        With ``training.save_after_eval`` the evaluation comes before the checkpoint. A decision to finish makes this
        boundary that of the last step. So does one during its evaluation: a checkpoint that was written before is then
        replaced.
        """
        logs = is_last or self.run.step % (self.run.config.training.logging_steps or _UNLOGGED) == 0
        if logs:
            self._log_interval()
        decision = self._decide()
        if logs:
            self._refuse_untrained()
        if decision.finish and not is_last and self._buffer:
            self._log_interval()
            decision = decision.merged(self._decide())  # what was logged may halt the run
        if logs and not decision.save and self.checkpointer.retry_due:
            decision = evolve(decision, save="the one before could not be written")
        return self._evaluate_and_save(decision, is_last=is_last)

    def _evaluate_and_save(self, decision: Decision, *, is_last: bool) -> Decision:
        """Do both if they are due, in the order that the run has. Returns how to go on."""
        run, ends = self.run, is_last or bool(decision.finish)
        is_due = bool(decision.evaluate or (decision.finish and not is_last and run.config.training.eval_steps))
        evaluates = is_due and self._evaluated != run.step
        if evaluates and self._saves_after_eval:
            decision = self._evaluate_first(decision, is_last=ends)
        if decision.finish and not decision.halt and not is_last:
            run.state.finish(decision.finish)
            self.checkpointer.outdate()
        reason = "last step" if is_last else decision.halt or decision.finish or decision.stop or decision.save
        if reason:
            self._refuse_untrained()
            if not_finite := self._save(reason, blocking=is_last or decision.should_stop):
                return Decision(halt=not_finite)
        if evaluates and not decision.interrupts and not self._saves_after_eval:
            self._evaluate()
            if not ends and self.control.any_finishing():
                return self._boundary(is_last=False)
        return decision

    def _evaluate_first(self, decision: Decision, *, is_last: bool) -> Decision:
        """Evaluate. Returns the decision with what was requested meanwhile, for the checkpoint to come.

        An evaluation that a stop leaves out is kept in the checkpoint, and the next launch begins with it.
        """
        done = False
        if not decision.interrupts:
            done = self._evaluate()
            self.checkpointer.outdate()
            later = self._decide()
            if later.evaluate:
                self.run.control.evaluate(later.evaluate)  # for the next step: this one is evaluated
            # After the last step only a halt changes how the run ends, and a stop that has left the evaluation out.
            decision = decision.merged(evolve(later, stop="") if done and is_last else later)
        self.run.state.keep_evaluation_due(not done and not is_last)
        return decision

    def _log_interval(self) -> None:
        """Log the steps since the last logging boundary, if there are any."""
        if self._buffer:
            self._log(notify=bool(self.run.config.training.logging_steps))
        with self._timer.paused():
            self.checkpointer.poll(wait=False)

    def _decide(self) -> Decision:
        decision = self.control.decide()
        for name, message in zip(decision.disabled_plugins, decision.failures, strict=True):
            self.calls.disable(name)
            if message:
                self.run.log.warning(message, name="plugin_failed", plugin=name)
        if decision.rebuild:
            self._synchronize()
            with self._timer.paused():
                self.rebuild(decision.rebuild)
                self._warm_up()
            self._lengths.clear()  # it compiles again, and the new state has to be one that can be saved
        return decision

    def _log(self, *, notify: bool) -> None:
        """Read the interval's metrics in one device read and one collective, and hand them to the plugins."""
        run, calls, step = self.run, self.calls, self.run.step
        self._meet()
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
            if self.time_budget is not None:
                self.time_budget.record_lap(split.train_seconds / split.timed_steps)
        self._update_status()
        if notify and calls.on_metrics is not None:
            calls.on_metrics(run, MetricsReady(step, run.tokens, floats))

    def _evaluate(self) -> bool:
        """Run the plugins' evaluations. A stop that arrives meanwhile abandons them, and the result is false."""
        run, calls, state = self.run, self.calls, self.run.state
        if calls.evaluate is None:
            return True
        self._synchronize()
        with self._timer.paused():
            started = time.perf_counter()
            try:
                with run.evaluating(), run.comm.during("evaluate"):
                    metrics = namespaced(calls.evaluate(run, Evaluate(state.step)))
            except EvaluationAbandoned:
                if run.watch.changed():
                    raise PluginError(
                        "the evaluation was abandoned, because the run is stopping, while a plugin had changed the"
                        " model's weights; they are not saved, and the last checkpoint stays",
                        hint="change weights with run.weights, which puts them back",
                    ) from None
                run.log.info("evaluation abandoned: the run is stopping", name="evaluation_abandoned")
                return False
            floats = resolve_name_collisions(self._reducer.reduce(metrics), self.control.plugins)
            self._last_eval, self._evaluated = floats, state.step
            if (loss := floats.get(VAL_LOSS)) is not None and math.isfinite(loss):
                state.record_val_loss(loss)
                self.checkpointer.record_val_loss(loss)
            if calls.on_eval_end is not None:
                seconds = time.perf_counter() - started
                calls.on_eval_end(run, EvalEnd(state.step, state.tokens, floats, seconds))
        return True

    def _save(self, reason: str, *, blocking: bool) -> str:
        """Save this step. Returns why the run must halt, or an empty string."""
        started = time.perf_counter()
        self._synchronize()
        with self._timer.paused():
            return self.checkpointer.save(reason, blocking=blocking, started=started)

    def _outcome(self, decision: Decision) -> tuple[RunStatus, str]:
        """How the run ends. A halt needs a person, whatever else was decided; a complete run is not stopped."""
        step = self.run.step
        reason = self.run.state.finished or (f"finished all {step} steps" if step == self._max_steps else "")
        if decision.halt:
            return "halted", decision.halt
        if reason and decision.stop and self._evaluated != step:
            reason += f"; the last evaluation was left out: {decision.stop}"
        return ("completed", reason) if reason else ("stopped", decision.stop)

    def _update_status(self) -> None:
        # Of the latest intervals only: the list grows with the run.
        rate = statistics.median(self._rates[-15:]) if self._rates else None
        left = self._plan.tokens_between(self.run.step, self._max_steps)
        self.checkpointer.run_dir.status.update(
            state="running",
            step=self.run.step,
            max_steps=self._max_steps,
            loss=self._last_train.get("train/loss"),
            tokens_per_second=rate,
            eta_seconds=left / rate if rate else None,
        )
