"""The step loop.

Read ``train`` for the life of a run, ``TrainStep`` for one optimizer step, ``_boundary`` for what may happen after it.
Between logging points nothing here reads a device tensor on the host.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from attrs import define, field

from gpt_simple.checkpoint.store import Store
from gpt_simple.data.loader import DataExhausted, Loader
from gpt_simple.engine.checkpointer import RunDirOwner, Saving, State
from gpt_simple.engine.control import Verdict
from gpt_simple.engine.loss_monitor import Watch, not_finite_in
from gpt_simple.engine.memory import peak_bytes
from gpt_simple.engine.metrics import Clock, Interval, labelled, settled
from gpt_simple.engine.step import TrainStep
from gpt_simple.engine.time_budget import StopNow, Walltime
from gpt_simple.engine.views import EngineRun, EvaluationAbandoned
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
from gpt_simple.plugin_host.dispatch import Calls

GIB = 1024**3

_UNLOGGED = 100
"""Steps after which the device is read when nothing is logged: skipped steps must not go on unseen."""


@define(slots=False, eq=False)
class Trainer:
    """A prepared run. ``run`` makes its steps and returns how it ended."""

    run: EngineRun
    calls: Calls
    train_step: TrainStep
    loader: Loader
    store: Store
    owner: RunDirOwner
    state: Callable[[float | None], State]
    walltime: Walltime | None = None
    best_val_loss: float | None = None
    last_train: Mapping[str, float] = field(factory=dict)
    last_eval: Mapping[str, float] = field(factory=dict)
    rates: list[float] = field(factory=list)
    _interval: Interval = field(factory=Interval)
    _clock: Clock = field(factory=Clock)

    def __attrs_post_init__(self) -> None:
        self._first_step = True
        self._saving = Saving(
            self.run,
            self.calls,
            self.train_step.model,
            self.store,
            lambda: self.state(self.best_val_loss),
            self.walltime,
            self.owner,
        )
        self._watch = Watch(self.run.config.training.max_skipped_steps)

    def train(self) -> tuple[RunStatus, str]:
        """Make steps until the run is over. Returns how and why it ended."""
        try:
            return self._train()
        except StopNow as stop:
            return "stopped", str(stop)

    def _train(self) -> tuple[RunStatus, str]:
        run, max_steps = self.run, self.run.config.training.max_steps
        self.train_step.model.train()
        if (verdict := self._vote()).leave:
            return self._left(verdict)
        if run.world.size > 1:
            self._warm_up_ddp()
        self._clock = Clock(waited_before=self.loader.wait_seconds)
        while run.step < max_steps:
            try:
                self.step(is_last=run.step + 1 == max_steps)
            except DataExhausted as exhausted:
                return self._out_of_data(str(exhausted))
            verdict = self._boundary(is_last=run.step == max_steps)
            if verdict.leave:
                return self._left(verdict)
        return "completed", f"all {max_steps} steps are made"

    def _warm_up_ddp(self) -> None:
        training, data = self.run.config.training, self.run.config.data
        shape = (training.per_device_batch_size, data.max_length)
        zeros = torch.zeros(shape, dtype=torch.int64, device=self.run.device)
        extra = zeros if data.document_mask else None
        self.train_step.warm_up_ddp(Batch(zeros, zeros, extra, extra, first_sample=0, targets=zeros.numel()))

    def step(self, is_last: bool) -> None:
        """One optimizer step over all its micro-batches."""
        run, calls = self.run, self.calls
        started, step = time.perf_counter(), run.step + 1
        data = self.loader.next_step()
        if calls.on_step_start is not None:
            calls.on_step_start(run, StepStart(step))
        result = self.train_step(
            step,
            data.batches,
            data.targets,
            on_batch=None if calls.on_batch is None else self._on_batch,
            on_gradients=None if calls.on_gradients is None else self._on_gradients,
            before_update=self._before_update,
        )
        run.moved_to(step, run.tokens + data.tokens, run.target_tokens + data.targets)
        self._interval.add(step, data, *result)
        self._clock.step(data.tokens, data.targets)
        if self._first_step:
            self._warmed_up(started, data.tokens)
        elif self.walltime is not None:
            self.walltime.stepped(time.perf_counter() - started)
        if calls.on_step_end is not None:
            calls.on_step_end(run, StepEnd(step, run.tokens, run.target_tokens, is_last))

    def _on_batch(self, index: int, batch: Batch) -> None:
        if self.calls.on_batch is not None:
            self.calls.on_batch(self.run, BatchReady(self.run.step + 1, index, batch))

    def _on_gradients(self) -> torch.Tensor | None:
        """Call the hook; the flag of a plugin that skips the step."""
        run, calls = self.run, self.calls
        if calls.on_gradients is not None:
            with run.comm.during("on_gradients"):
                calls.on_gradients(run, GradientsReady(run.step + 1))
        flag, run.control.skip = run.control.skip, None
        return flag

    def _before_update(self) -> None:
        # From here on there is something to save: a signal waits for the end of the step.
        self.run.control.at_once = False

    def _warmed_up(self, started: float, tokens: int) -> None:
        """The first step compiles and warms caches up: its time is nobody's throughput."""
        self._first_step = False
        self._finish_queue()
        self._clock.exclude_step(time.perf_counter() - started, tokens)

    def _finish_queue(self) -> None:
        """Wait for the device, so that its steps do not count as what comes after them."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def _boundary(self, is_last: bool) -> Verdict:
        """What may happen after a step, always in this order: metrics, one vote, checkpoint, evaluation, stop."""
        run = self.run
        every = run.config.training.logging_steps
        looks = is_last or run.step % (every or _UNLOGGED) == 0
        if looks:
            self._log(tell=bool(every))
            with self._clock.paused():
                self._saving.land(wait=False)
        verdict = self._vote()
        again = self._saving.again if looks else ""
        if verdict.save or verdict.leave or is_last or again:
            reason = "last step" if is_last else verdict.stop or verdict.halt or verdict.ended or verdict.save or again
            if not self._save(reason, must_succeed=verdict.leave or is_last):
                return Verdict(halt=self._saving.not_finite(run.step))
        if verdict.evaluate and not verdict.leave:
            self._evaluate()
        return verdict

    def _vote(self) -> Verdict:
        world = self.run.world
        verdict = self.run.control.vote(world if world.size > 1 else None)
        for name in verdict.off:
            self.calls.disable(name)
        return verdict

    def _log(self, tell: bool) -> None:
        """Read the interval's metrics, all at once, and hand them out."""
        run, calls = self.run, self.calls
        # Read first: this waits for the device to make the steps that are in its queue, and their time counts.
        metrics, steps = self._interval.read(self.train_step.schedule(run.step), run.world_size)
        lap, self._clock = self._clock.lap(run.step, self.loader.wait_seconds)
        if tell and calls.collect_metrics is not None:
            with run.comm.during("collect_metrics"):
                metrics |= labelled(calls.collect_metrics(run, lap))
        metrics["train/not_finite_in"] = not_finite_in(steps, run.rank)
        floats = settled(run.world.reduce(metrics), run.control.plugins)
        first = floats.pop("train/not_finite_in")
        where = f"; the loss was not finite in process {first:.0f}" if run.world.size > 1 and first < math.inf else ""
        skipped = floats.pop("train/skipped_steps")
        if skipped:
            floats["train/skipped_steps"] = skipped
            run.log.warning(
                f"{int(skipped)} of the last {lap.steps} steps had a non-finite gradient and were skipped{where}",
                name="skipped_steps",
                count=int(skipped),
            )
        if spike := self._watch.spike(steps):
            run.log.warning(str(spike), name="loss_spike", at=spike.made.step, loss=spike.made.loss, usual=spike.usual)
        if streak := self._watch.streak(steps):
            run.control.halt(streak + where)
        self.last_train = floats
        if lap.timed_steps and lap.train_seconds > 0:
            self.rates.append(lap.timed_tokens / lap.train_seconds)
        self._report_status()
        if tell and calls.on_metrics is not None:
            calls.on_metrics(run, MetricsReady(run.step, run.tokens, floats))

    def _evaluate(self) -> None:
        """Ask the plugins for their evaluations; a stop that arrives meanwhile abandons them."""
        run, calls = self.run, self.calls
        if calls.evaluate is None:
            return
        self._finish_queue()
        started = time.perf_counter()
        try:
            with run.evaluating(), run.comm.during("evaluate"):
                metrics = labelled(calls.evaluate(run, Evaluate(run.step)))
        except EvaluationAbandoned:
            run.log.info("evaluation abandoned: the run is stopping", name="evaluation_abandoned")
            return
        floats = settled(run.world.reduce(metrics), run.control.plugins)
        loss = floats.get("eval/loss")
        if loss is not None and (self.best_val_loss is None or loss < self.best_val_loss):
            self.best_val_loss = loss
        self.last_eval = floats
        seconds = time.perf_counter() - started
        if calls.on_eval_end is not None:
            calls.on_eval_end(run, EvalEnd(run.step, run.tokens, floats, seconds))
        self._clock.exclude(time.perf_counter() - started)

    def _save(self, reason: str, must_succeed: bool) -> bool:
        """Publish a checkpoint of this step; False if the weights are not finite, and the run must halt."""
        self._finish_queue()
        with self._clock.paused():
            return self._saving.save(reason, must_succeed=must_succeed)

    def close(self) -> None:
        """Stop the threads; a checkpoint that is on its way arrives."""
        self.loader.close()
        self._saving.close()

    def _left(self, verdict: Verdict) -> tuple[RunStatus, str]:
        if verdict.halt:
            return "halted", verdict.halt
        if self.run.step == self.run.config.training.max_steps:
            return "completed", f"all steps are made; a last evaluation was left out: {verdict.stop or verdict.ended}"
        if verdict.stop:
            return "stopped", verdict.stop
        return "completed", verdict.ended

    def _out_of_data(self, reason: str) -> tuple[RunStatus, str]:
        """The data ended before ``max_steps``: that is the end of the run as much as the last step would be."""
        if self._interval:
            self._log(tell=True)
        if not self._save(reason, must_succeed=True):
            return "halted", self._saving.not_finite(self.run.step)
        if self.run.config.training.eval_steps:
            self._evaluate()
        return "completed", reason

    def _report_status(self) -> None:
        run = self.run
        # Of the latest intervals only: the list grows with the run.
        rate = statistics.median(self.rates[-15:]) if self.rates else None
        left = run.config.training.max_steps - run.step
        per_step = run.known.get("tokens_per_step", 0)
        self.owner.status.update(
            state="running",
            step=run.step,
            max_steps=run.config.training.max_steps,
            loss=self.last_train.get("train/loss"),
            tokens_per_second=rate,
            eta_seconds=left * per_step / rate if rate else None,
        )

    @property
    def peak_memory_gib(self) -> float:
        return peak_bytes(self.run.device) / GIB
