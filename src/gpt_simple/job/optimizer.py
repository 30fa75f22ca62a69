"""The optimizer of a run: built for the model's trained parameters, and its part of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from gpt_simple.checkpoint.state import flatten_optimizer
from gpt_simple.engine.optimizer_modes import enter_train_mode
from gpt_simple.engine.optimizers import CurrentOptimizer, skips_on_device
from gpt_simple.engine.resume import ResumePlan
from gpt_simple.engine.views import OptimizerView
from gpt_simple.errors import CheckpointError, PluginError
from gpt_simple.hooks.components import Component
from gpt_simple.hooks.events import OptimizerBuilt
from gpt_simple.job.job import Job


def build_optimizer(job: Job, model: torch.nn.Module, plan: ResumePlan) -> CurrentOptimizer:
    """The run's optimizer, whose state is still to be restored. Calls ``on_optimizer_built``."""
    current = CurrentOptimizer(model, _new_optimizer(job, model), _component(job).attributed)
    if not skips_on_device(current.optimizer):
        job.plugins.log.info(
            f"optimizer {job.config.optimizer.name} has no found_inf, with which it would skip a non-finite step by"
            " itself: the host reads one value a step",
            name="host_read",
        )
    job.plugins.adopt(job.plugins.extended_view(OptimizerView, current=current))
    _announce(job, current, plan.step)
    return current


def _component(job: Job) -> Component:
    return job.spec.registry.get("optimizer", job.config.optimizer.name)


def _new_optimizer(job: Job, model: torch.nn.Module) -> torch.optim.Optimizer:
    part = _component(job)
    optimizer: torch.optim.Optimizer = part.build(model, job.config.optimizer, job.dist.device)
    enter_train_mode(optimizer, part.attributed)
    return optimizer


def _announce(job: Job, current: CurrentOptimizer, step: int) -> None:
    """Call ``on_optimizer_built``. What it changes is no state of the optimizer: it is called again at a resume."""
    plugins = job.plugins
    if plugins.calls.on_optimizer_built is not None:
        with plugins.comm.during("on_optimizer_built"):
            plugins.calls.on_optimizer_built(plugins.view, OptimizerBuilt(current.optimizer, step))
        current.settle()


def optimizer_state(job: Job, current: CurrentOptimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's part of a checkpoint. Raises PluginError, naming the component, for state that cannot be saved.

    The run ends with it: a save that is tried again fails again.
    """
    label = _component(job).label
    try:
        return flatten_optimizer(current.optimizer, current.model, current.as_built)
    except CheckpointError as error:
        raise PluginError(*(p._replace(message=f"{label}: {p.message}") for p in error.problems)) from error
    except Exception as error:
        raise PluginError(f"{label}: its state cannot be read: {type(error).__name__}: {error}") from error
