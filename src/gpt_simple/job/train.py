"""One launch, from a resolved configuration to its result."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gpt_simple.engine.compile import compile_flags
from gpt_simple.engine.determinism import deterministic_kernels
from gpt_simple.engine.memory import reset_peak
from gpt_simple.engine.process_state import preserved_process_state
from gpt_simple.engine.state import TrainState
from gpt_simple.engine.stop_signals import StopNow, StopSignals, stop_signals
from gpt_simple.job.build import build_trainer
from gpt_simple.job.claim import claim_run_dir
from gpt_simple.job.job import Job
from gpt_simple.job.memory_advice import advised_failures
from gpt_simple.job.plugin_calls import plugin_calls
from gpt_simple.job.result import TrainResult
from gpt_simple.job.runtime import resolve_runtime
from gpt_simple.job.stages import (
    check_config,
    decide_checkpointing,
    find_checkpoint,
    init_distributed,
    plan_resume,
    preflight,
    prepare_data,
)
from gpt_simple.job.summary import (
    already_finished,
    bring_to_store,
    run_to_end,
    stopped_before_first_step,
    stopped_while_joining,
)
from gpt_simple.spec import RunSpec


def train(
    spec: RunSpec, *, force: bool = False, pending_signals: Sequence[str] = (), started: float | None = None
) -> TrainResult:
    """One launch. Each stage runs on every rank or fails on every rank, and returns what the next ones need.

    Errors leave as GptSimpleError; how a run ended is in the result's ``status``. ``pending_signals``: a live list of
    the signals that arrived while the program was loading. ``started``: the moment of ``time.monotonic`` at which the
    launch began (None: now). A spec serves one launch: it holds the instances of its plugins.
    """
    began = time.monotonic() if started is None else started
    deterministic = deterministic_kernels(spec.config.training.deterministic)
    with preserved_process_state(), stop_signals(pending_signals) as signals, spec.located_errors(), deterministic:
        try:
            return _train(spec, force, began, signals)
        except StopNow as stop:
            return stopped_while_joining(spec, began, stop)


def _train(spec: RunSpec, force: bool, began: float, signals: StopSignals) -> TrainResult:
    state, found = TrainState(), None
    with init_distributed(spec, signals) as dist:
        reset_peak(dist.device)  # an earlier run in this process may have needed more
        runtime = resolve_runtime(spec, dist, began)
        with (
            dist.explained_failures(lambda: state.step),
            plugin_calls(spec, dist, runtime.precision, state) as plugins,
            spec.located_errors(),  # inside, too: plugins and other ranks see where an error comes from
            advised_failures(spec, dist.device, runtime.checkpointing),
        ):
            job = Job(spec, force, began, dist, runtime, signals, plugins, state)
            try:
                check_config(job)
                found = find_checkpoint(job)
                data = prepare_data(job, found)
                job = decide_checkpointing(job, found, data)
                plan = plan_resume(job, found, data)
                time_budget = preflight(job, data, plan)
                if plan.is_finished:
                    bring_to_store(job, found)
                    return already_finished(job, plan)
                with (
                    compile_flags(job.runtime.compile_plan),
                    claim_run_dir(job, data, plan) as run_dir,
                    build_trainer(job, data, plan, time_budget, run_dir) as trainer,
                ):
                    return run_to_end(job, data, plan, run_dir, trainer)
            except StopNow as stop:
                return stopped_before_first_step(job, found, stop)
