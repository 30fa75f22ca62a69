"""Where a run would write, who owns the directory, and how much space its checkpoints take."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from gpt_simple._files import nearest_existing
from gpt_simple.checkpoint.store import Store
from gpt_simple.config.schema import Config, OptimizerConfig, TrainingConfig
from gpt_simple.engine.compatibility import flatten
from gpt_simple.hooks.preflight import CheckedOutput
from gpt_simple.model.flops import parameter_count, tensor_count
from gpt_simple.model.shape import Shape
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import in_use, owner_of

DOCUMENTS = 8192, 1280, 48
"""At most so many bytes of a checkpoint are no tensors: in all (beside the configuration, which is in it), for the
names and layouts of a parameter in headers, manifest and state, and for each evaluation. Plugins may keep more.
"""


def check_output(config: Config, shape: Shape | None, *, steps_done: int, force: bool) -> CheckedOutput:
    """``shape`` is None for a model of a plugin.

    Raises ConfigError for a directory that cannot be written, CheckpointError for one that is in use.
    """
    training = config.training
    run_dir = RunDir(Path(training.output_dir))
    run_dir.check()
    owner, liveness = owner_of(run_dir)
    if liveness == "holds":
        raise in_use(run_dir, owner)
    existing = Store(run_dir.checkpoints).list()
    tensors, documents = _sizes(config, shape)
    if not tensors and existing:
        tensors = _tree_bytes(existing[-1].path)
    size = tensors + documents or None
    there = sum(_tree_bytes(checkpoint.path) for checkpoint in existing)
    freed = there if force else 0
    most = most_checkpoints(training)
    needed = None if size is None else max(size - freed, most * size - there)
    if steps_done >= training.max_steps:
        needed = 0
    free = shutil.disk_usage(nearest_existing(run_dir.root)).free
    return CheckedOutput(run_dir.root, size, tensors, most, needed, free, freed)


def most_checkpoints(training: TrainingConfig) -> int:
    """The most checkpoints at one time: while the last is written, the newest, older milestones, and the best."""
    every, steps = training.save_steps or training.max_steps, training.max_steps
    saves = -(-steps // every)
    if training.keep_last_k is None:
        return saves
    newest = max(2, training.keep_last_k)
    older = max(0, saves - 1 - newest)

    def among_older(interval: int | None) -> int:
        return older * every // math.lcm(every, interval) if interval else 0

    milestones = among_older(training.keep_milestone_every)
    best = milestones < older and among_older(training.eval_steps) > 0
    return min(saves, newest + milestones + best + 1)


def _sizes(config: Config, shape: Shape | None) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors, and the most of everything else; 0 and 0 for parts of plugins.

    Tensors are weights and both moments in fp32, and AdamW's step counters.
    """
    training = config.training
    if shape is None or type(config.optimizer) is not OptimizerConfig:
        return 0, 0
    in_all, per_parameter, per_evaluation = DOCUMENTS
    evaluations = training.max_steps // training.eval_steps if training.eval_steps else 0
    fields = len(json.dumps(flatten(config), indent=4))
    count = tensor_count(shape)
    tensors = 12 * parameter_count(shape) + 4 * count
    return tensors, in_all + fields + per_parameter * count + per_evaluation * evaluations


def _tree_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
