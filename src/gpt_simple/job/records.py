"""What a launch compares across ranks, and what it writes down about itself."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from gpt_simple._names import __version__
from gpt_simple.engine.compatibility import flatten
from gpt_simple.engine.resume import ResumePlan
from gpt_simple.errors import CheckpointError
from gpt_simple.hooks.results import VAL_LOSS
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord, read_metrics
from gpt_simple.spec import RunSpec


def launch_facts(spec: RunSpec) -> dict[str, Any]:
    """What must be the same on every rank before any of them reads a file."""
    plugins = [f"{plugin.name} {plugin.version}" for plugin in spec.host.plugins]
    versions = {"gpt-simple": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**flatten(spec.config), "plugins": plugins, "their code": spec.host.order_hash(), **versions}


def run_facts(spec: RunSpec, plan: ResumePlan, run: Mapping[str, Any]) -> dict[str, Any]:
    """The ``facts`` of run.json. ``run``: those that plugins see."""
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


def best_val_loss(plan: ResumePlan) -> float | None:
    """The lowest validation loss up to the checkpoint's step.

    A checkpoint is saved before its step is evaluated: that loss is in run.json, in older runs in metrics.jsonl.
    """
    found = plan.found
    if found.checkpoint is None:
        return None
    step, run_dir = found.checkpoint.step, RunDir(found.checkpoint.path.absolute().parent.parent)
    losses = [found.state["best_val_loss"], *_val_losses(run_dir, step)]
    return min((loss for loss in losses if loss is not None), default=None)


def _val_losses(run_dir: RunDir, step: int) -> list[float | None]:
    with suppress(CheckpointError):
        if (loss := RunRecord.load(run_dir).val_losses.get(str(step))) is not None:
            return [loss]
    rows = read_metrics(run_dir.metrics_jsonl, "eval") if run_dir.metrics_jsonl.exists() else []
    return [row.get(VAL_LOSS) for row in rows if row["step"] == step]
