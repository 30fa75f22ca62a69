"""How a run ended: ``summary.json`` and the result of ``train``."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, fields

from gpt_simple._documents import read
from gpt_simple._names import PROGRAM, __version__
from gpt_simple.config.load import redacted_arguments, redacted_text, split_overrides
from gpt_simple.data.dataset import Dataset
from gpt_simple.engine.compatibility import flatten
from gpt_simple.engine.memory import GIB, peak_bytes
from gpt_simple.engine.resume import FoundCheckpoint, ResumePlan
from gpt_simple.engine.stop_signals import StopNow
from gpt_simple.engine.trainer import FitResult, Trainer
from gpt_simple.hooks.events import RunEnd, RunStart
from gpt_simple.hooks.results import VAL_LOSS
from gpt_simple.job.claim import ClaimedRunDir
from gpt_simple.job.job import Job
from gpt_simple.job.result import TrainResult
from gpt_simple.launch.member import has_foreign_launcher, owns_run
from gpt_simple.run_dir.layout import RunDir, write_json
from gpt_simple.spec import RunSpec

_SHARED = [item.name for item in fields(TrainResult) if item.name not in ("checkpoint_path", "output_dir", "summary")]
"""What a TrainResult and ``summary.json`` have under the same name."""
_SHAPE = {f"{name}?": (None, float) for name in _SHARED if name not in ("status", "reason")}


def run_to_end(job: Job, data: Dataset, plan: ResumePlan, run_dir: ClaimedRunDir, trainer: Trainer) -> TrainResult:
    """Record the launch, train, and record the outcome."""
    run, calls, state = trainer.run, trainer.calls, job.state
    info = _recorded_info(job.spec, plan, run.facts())
    job.dist.on_main(lambda: run_dir.record_launch(info, state.step, plan))
    owns_run()
    if calls.on_run_start is not None:
        event = RunStart(
            step=state.step,
            max_steps=job.config.training.max_steps,
            tokens=state.tokens,
            resumed_from=plan.source,
            promise=plan.guarantee,
            best_val_loss=state.best_val_loss,
            facts=run.facts(),
        )
        calls.on_run_start(run, event)
    fit = trainer.fit()
    await_store(job, plan.found)
    fit = evolve(fit, reason=job.spec.without_secrets(fit.reason))
    summary = _summarise(job, data, run_dir, fit)
    if calls.on_run_end is not None:
        calls.on_run_end(run, RunEnd(fit.status, state.step, state.tokens, fit.reason, summary))
    if run.is_main:
        _write_summary(job, summary)
    run_dir.status.update(state=fit.status, step=state.step, reason=fit.reason, force=True)
    return _result(summary, run.output_dir)


def await_store(job: Job, found: FoundCheckpoint) -> None:
    """Wait until the store, if there is one, holds all checkpoints. Raises CheckpointError if it cannot be reached."""
    if job.has_store:
        job.dist.on_main(lambda: found.mirror.finish(job.plugins.log) if found.mirror is not None else None)


def bring_to_store(job: Job, found: FoundCheckpoint) -> None:
    """Copy what an earlier launch has not copied into the store, as after a kill, and wait for it."""
    if (mirror := found.mirror) is not None:
        mirror.begin_missing()
    try:
        await_store(job, found)
    finally:
        if mirror is not None:
            mirror.close(job.plugins.log, owns_run=False)


def _recorded_info(spec: RunSpec, plan: ResumePlan, run: Mapping[str, Any]) -> dict[str, Any]:
    """The ``facts`` of run.json. ``run``: the run info that plugins get."""
    return {
        "version": __version__,
        "config": flatten(spec.config),
        "origins": {path: origin.where for path, origin in spec.origins.by_path.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "plugins": {p.name: f"{p.distribution} {p.version}".strip() or p.file for p in spec.host.plugins},
        "run": dict(run),
        "data": plan.fingerprint["data"],
        "numerics": plan.fingerprint["numerics"],
        "promise": plan.guarantee,
    }


def _write_summary(job: Job, summary: dict[str, Any]) -> None:
    path = job.run_dir.summary_json
    try:
        write_json(path, summary)
    except OSError as error:
        # The weights are saved: a disk that is full now does not fail the run.
        job.plugins.log.error(f"{path} was not written: {error.strerror}", name="output_failed")


def _summarise(job: Job, data: Dataset, run_dir: ClaimedRunDir, fit: FitResult) -> dict[str, Any]:
    """What ``summary.json`` holds. Losses are in nats per target token."""
    state, newest, steps = job.state, run_dir.store.list(), job.config.training.max_steps
    # What the next launch needs to continue: data that do not end, more steps, or no change.
    change: dict[str, str] = {}
    if fit.status == "completed":
        change = {"data.on_exhaustion": "repeat"} if fit.data_ended else {"training.max_steps": str(2 * steps)}
    host = job.spec.host
    return {
        "status": fit.status,
        "reason": fit.reason,
        "steps": state.step,
        "total_tokens": state.tokens,
        "total_target_tokens": state.target_tokens,
        "final_loss": fit.last_train.get("train/loss"),
        "final_val_loss": fit.last_eval.get(VAL_LOSS),
        "best_val_loss": state.best_val_loss,
        "bits_per_byte": fit.last_eval.get("eval/bits_per_byte"),
        "floor": data.floor,
        "tokens_per_second": statistics.median(fit.rates) if fit.rates else None,
        "peak_memory_gib": peak_bytes(job.dist.device) / GIB,
        "seconds": time.monotonic() - job.began,
        "checkpoint": str(newest[-1].path) if newest else None,
        "plugins": job.spec.without_secrets(host.describe()),
        "plugin_seconds": {plugin.name: round(plugin.seconds, 4) for plugin in host.plugins},
        "next": f"{_again(job.spec, change)} goes on from here",
        "sample": _sample(job.spec),
    }


def _again(spec: RunSpec, change: Mapping[str, str]) -> str:
    """The command as it was given, with other values of some dotted keys and without what starts from scratch.

    Secrets in it are redacted.
    """
    if not spec.arguments:
        return f"train(...) {' '.join(['with', *chain(*change.items())]) if change else 'again'}"
    given, words = split_overrides(spec.arguments)
    overrides = {key: text for key, text in given if (key, text) != ("training.resume", "scratch")} | dict(change)
    origins = spec.origins.chain("training.resume")
    if spec.config.training.resume == "scratch" and origins != ["--training.resume"]:
        overrides["training.resume"] = "auto"
    command = [PROGRAM, *redacted_arguments([word for word in words if word not in ("--force", "--")])]
    for key, text in overrides.items():
        text = redacted_text(key, text)
        command += [f"--{key}={text}"] if text.startswith("--") else [f"--{key}", text]
    return shlex.join(command)


def _sample(spec: RunSpec) -> str:
    """The command that samples from the model."""
    owner = spec.registry.get("model", spec.config.model.name).owner
    files = [p.file for p in spec.host.plugins if p.label == owner and not p.distribution]
    words = ["sample", spec.config.training.output_dir, *(word for file in files for word in ("-p", file))]
    return f'{PROGRAM} {shlex.join(words)} --prompt "Once"'


def already_finished(job: Job, plan: ResumePlan) -> TrainResult:
    """The result of a run that was completed before. Changes nothing."""
    state, run_dir = plan.found.state, job.run_dir
    reason = plan.why_finished
    job.plugins.log.info(f"{run_dir.root}: nothing to do, {reason}, or add --force to start anew", name="finished")
    summary: dict[str, Any] = dict.fromkeys(_SHARED) | {"best_val_loss": state["best_val_loss"]}
    with suppress(OSError, ValueError):
        summary |= read(run_dir.summary_json, _SHAPE)
    summary |= {"status": "completed", "reason": reason, "checkpoint": str(plan.source)} | _counts(state)
    return _result(summary, run_dir.root)


def stopped_before_first_step(job: Job, found: FoundCheckpoint | None, stop: StopNow) -> TrainResult:
    """The result of a launch that was stopped before it finished a step. The run is as the last launch left it."""
    job.plugins.log.info(f"stopped: {stop}, before the first step; the same command goes on", name="stopped_early")
    return _stopped(job.run_dir, job.began, stop, found, job.dist.device)


def stopped_while_joining(spec: RunSpec, began: float, stop: StopNow) -> TrainResult:
    """The result of a launch that was stopped while its processes met. No plugin is called yet."""
    if os.environ.get("RANK") == "0" or has_foreign_launcher(os.environ):
        print(f"stopped: {stop}, while the processes met; the same command goes on", file=sys.stderr)
    return _stopped(RunDir(Path(spec.config.training.output_dir)), began, stop, None, torch.device("cpu"))


def _stopped(
    run_dir: RunDir, began: float, stop: StopNow, found: FoundCheckpoint | None, device: torch.device
) -> TrainResult:
    state, newest = (found.state, found.store.list()) if found else ({}, [])
    summary: dict[str, Any] = dict.fromkeys(_SHARED) | _counts(state)
    summary |= {
        "status": "stopped",
        "reason": str(stop),
        "best_val_loss": state.get("best_val_loss"),
        "seconds": time.monotonic() - began,
        "peak_memory_gib": peak_bytes(device) / GIB,
        "checkpoint": str(newest[-1].path) if newest else None,
    }
    return _result(summary, run_dir.root)


def _counts(state: Mapping[str, Any]) -> dict[str, int]:
    """The counters of a checkpoint's state under the names of a result; zeros without a checkpoint."""
    names = {"steps": "step", "total_tokens": "tokens", "total_target_tokens": "target_tokens"}
    return {name: state.get(key, 0) for name, key in names.items()}


def _result(summary: dict[str, Any], output_dir: Path) -> TrainResult:
    checkpoint = summary["checkpoint"]
    return TrainResult(
        **{name: summary[name] for name in _SHARED},
        checkpoint_path=Path(checkpoint) if checkpoint else None,
        output_dir=output_dir,
        summary=summary,
    )
