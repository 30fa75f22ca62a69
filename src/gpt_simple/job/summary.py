"""How a run ended, for people, for ``summary.json`` and for the caller of ``train``."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from gpt_simple._names import PROGRAM
from gpt_simple.checkpoint.store import Store
from gpt_simple.config.load import split_overrides
from gpt_simple.config.redact import redacted
from gpt_simple.engine.resume import ResumePlan
from gpt_simple.engine.trainer import GIB, Trainer
from gpt_simple.engine.views import EngineRun
from gpt_simple.hooks.events import RunStatus
from gpt_simple.job.result import TrainResult
from gpt_simple.job.stages import Setup
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.spec import Assembly

_SHARED = (
    "status",
    "reason",
    "steps",
    "total_tokens",
    "total_target_tokens",
    "final_loss",
    "final_val_loss",
    "best_val_loss",
    "bits_per_byte",
    "floor",
    "seconds",
    "tokens_per_second",
    "peak_memory_gib",
)


def summarise(trainer: Trainer, setup: Setup, status: RunStatus, reason: str, seconds: float) -> dict[str, Any]:
    """What ``summary.json`` holds. Losses are in nats per target token."""
    run, newest = trainer.run, trainer.store.list()
    steps = run.config.training.max_steps
    # What leads further: more steps, data that do not end (there were fewer steps than were wanted), or nothing else.
    change: dict[str, str] = {}
    if status == "completed" and run.step >= steps:
        change = {"training.max_steps": str(2 * steps)}
    elif status == "completed" and run.config.data.on_exhaustion != "repeat":
        change = {"data.on_exhaustion": "repeat"}
    host = setup.assembly.host
    return {
        "status": status,
        "reason": reason,
        "steps": run.step,
        "total_tokens": run.tokens,
        "total_target_tokens": run.target_tokens,
        "final_loss": trainer.last_train.get("train/loss"),
        "final_val_loss": trainer.last_eval.get("eval/loss"),
        "best_val_loss": trainer.best_val_loss,
        "bits_per_byte": trainer.last_eval.get("eval/bits_per_byte"),
        "floor": setup.dataset.floor,
        "tokens_per_second": statistics.median(trainer.rates) if trainer.rates else None,
        "peak_memory_gib": trainer.peak_memory_gib,
        "seconds": seconds,
        "checkpoint": str(newest[-1].path) if newest else None,
        "plugins": host.describe(),
        "plugin_seconds": {plugin.name: round(plugin.seconds, 4) for plugin in host.plugins},
        "next": f"{_again(setup.assembly, change)} goes on from here",
        "sample": _sample(setup.assembly),
    }


def _again(assembly: Assembly, change: Mapping[str, str]) -> str:
    """The command as it was given, but never one that begins anew, and with other values of some dotted keys.

    It may be shown and kept, so a secret in it is not.
    """
    if not assembly.arguments:
        return f"train(...) {' '.join(['with', *chain(*change.items())]) if change else 'again'}"
    given, words = split_overrides(assembly.arguments)
    overrides = {key: text for key, text in given if (key, text) != ("training.resume", "scratch")} | dict(change)
    places = assembly.origins.chain("training.resume")
    if assembly.config.training.resume == "scratch" and places != ["--training.resume"]:
        overrides["training.resume"] = "auto"
    command = [PROGRAM, *(word for word in words if word not in ("--force", "--"))]
    for key, text in redacted(overrides).items():
        command += [f"--{key}={text}"] if text.startswith("--") else [f"--{key}", text]
    return shlex.join(command)


def _sample(assembly: Assembly) -> str:
    """What lets the model write."""
    owner = assembly.registry.get("model", assembly.config.model.name).owner
    files = [p.file for p in assembly.host.plugins if p.label == owner and not p.distribution]
    words = ["sample", assembly.config.training.output_dir, *(word for file in files for word in ("-p", file))]
    return f'{PROGRAM} {shlex.join(words)} --prompt "Once"'


def finished(run: EngineRun, run_dir: RunDir, resume: ResumePlan) -> TrainResult:
    """Nothing is left to do: say so, and hand back what the run had reached. Changes nothing."""
    assert resume.checkpoint is not None
    state = resume.state
    reason = f"step {state['step']} of {run.config.training.max_steps} was reached before: raise training.max_steps"
    run.log.info(f"{run_dir.root}: nothing to do, {reason}, or add --force to start anew", name="finished")
    try:
        summary = json.loads(run_dir.summary_json.read_text())
    except (OSError, ValueError):
        summary = dict.fromkeys(_SHARED) | {"best_val_loss": state["best_val_loss"], "floor": None}
    summary |= {
        "status": "completed",
        "reason": reason,
        "steps": state["step"],
        "total_tokens": state["tokens"],
        "total_target_tokens": state["target_tokens"],
        "checkpoint": str(resume.checkpoint.path),
    }
    return as_result(summary, run.output_dir)


def stopped_early(run: EngineRun, store: Store, resume: ResumePlan, reason: str, seconds: float) -> TrainResult:
    """Stopped before this launch made a step: everything is as the launch before it left it."""
    run.log.info(f"stopped: {reason}, before the first step; the same command goes on", name="stopped_early")
    newest, state = store.list(), resume.state
    summary: dict[str, Any] = dict.fromkeys(_SHARED) | {
        "status": "stopped",
        "reason": reason,
        "steps": state.get("step", 0),
        "total_tokens": state.get("tokens", 0),
        "total_target_tokens": state.get("target_tokens", 0),
        "best_val_loss": state.get("best_val_loss"),
        "seconds": seconds,
        "peak_memory_gib": run.peak_memory() / GIB,
        "checkpoint": str(newest[-1].path) if newest else None,
    }
    return as_result(summary, run.output_dir)


def as_result(summary: dict[str, Any], output_dir: Path) -> TrainResult:
    """The part of a summary that a caller of ``train`` gets as attributes."""
    checkpoint = summary["checkpoint"]
    return TrainResult(
        **{name: summary[name] for name in _SHARED},
        checkpoint_path=Path(checkpoint) if checkpoint else None,
        output_dir=output_dir,
        summary=summary,
    )
