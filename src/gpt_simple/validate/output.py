"""Where a run would write, who owns the place, and how much room its checkpoints take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from gpt_simple.checkpoint.store import Store
from gpt_simple.config.schema import OptimizerConfig, TrainingConfig
from gpt_simple.errors import CheckpointError, GptSimpleError
from gpt_simple.model.flops import parameter_count, tensor_count
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import owner_of

if TYPE_CHECKING:
    from gpt_simple.validate.outlook import Outlook

DOCUMENTS = 8192, 1024
"""Bytes of a checkpoint beside its tensors: in all, and for each parameter's entries in headers and manifest."""


@frozen
class OutputOutlook:
    """``checkpoint_bytes`` is None where the model or the optimizer is a plugin's and none was written yet.

    ``most`` is how many checkpoints the run has on disk at once at most, with the one being written; ``needed`` the
    bytes that it adds to what is there, ``free`` what the file system has.
    """

    directory: Path
    checkpoint_bytes: int | None
    most: int
    needed: int | None
    free: int


def look(outlook: Outlook) -> OutputOutlook:
    """Raises ConfigError for a place that cannot be written, CheckpointError for one that is in use."""
    training = outlook.config.training
    run_dir = RunDir(Path(training.output_dir))
    run_dir.check()
    owner, liveness = owner_of(run_dir)
    if liveness == "holds":
        who = owner or "another process"
        raise CheckpointError(f"{run_dir.root} is in use by {who}: stop it, or choose another training.output_dir")
    existing = Store(run_dir.checkpoints).list()
    size = _checkpoint_bytes(outlook)
    if size is None and existing:
        size = _tree_bytes(existing[-1].path)
    most = most_checkpoints(training)
    needed = None
    if size is not None:
        there = sum(_tree_bytes(checkpoint.path) for checkpoint in existing)
        needed = max(size if training.max_steps else 0, most * size - there)
    nearest = next(path for path in (run_dir.root, *run_dir.root.absolute().parents) if path.exists())
    return OutputOutlook(run_dir.root, size, most, needed, shutil.disk_usage(nearest).free)


def most_checkpoints(training: TrainingConfig) -> int:
    """The most checkpoints at one time: the newest, the best, milestones, and the one that is being written."""
    every, steps = training.save_steps or training.max_steps, training.max_steps
    saves = -(-steps // every)
    if training.keep_last_k is None:
        return saves
    milestones = steps // training.keep_milestone_every if training.keep_milestone_every else 0
    best = 1 if training.eval_steps else 0
    return min(saves, max(2, training.keep_last_k) + milestones + best + 1)


def _checkpoint_bytes(outlook: Outlook) -> int | None:
    """Weights and both moments in fp32, AdamW's step counters, and the documents; None for parts of plugins."""
    try:
        shape = outlook.shape
    except GptSimpleError:
        return None  # a finding of its own
    if shape is None or type(outlook.config.optimizer) is not OptimizerConfig:
        return None
    tensors = tensor_count(shape)
    per_all, per_tensor = DOCUMENTS
    return 12 * parameter_count(shape) + (4 + per_tensor) * tensors + per_all


def _tree_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
