"""The optimizer of a run: built for the model's trained parameters, and its part of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gpt_simple.checkpoint.state import carry_over, flatten_optimizer
from gpt_simple.distributed.process_group import digest
from gpt_simple.engine.compile import recompile_model
from gpt_simple.engine.components import build_step
from gpt_simple.engine.optimizer_modes import enter_train_mode
from gpt_simple.engine.optimizers import CurrentOptimizer, skips_on_device
from gpt_simple.engine.resume import ResumePlan
from gpt_simple.engine.step import TrainStep
from gpt_simple.engine.views import OptimizerView
from gpt_simple.errors import CheckpointError, PluginError, RankFailed
from gpt_simple.hooks.components import Component
from gpt_simple.hooks.events import OptimizerBuilt
from gpt_simple.job.job import Job
from gpt_simple.job.model import checkpoint_activations, refuse_unsharded

T = TypeVar("T")


TRAINED = "trained"
"""Where a checkpoint's state has the names of the trained parameters, in a run that has rebuilt its optimizer."""


def restore_trained(plan: ResumePlan, model: torch.nn.Module) -> None:
    """Train the parameters that the checkpoint's run trained, if that was changed after its start."""
    if (trained := plan.found.state.get(TRAINED)) is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


def build_optimizer(job: Job, model: torch.nn.Module, plan: ResumePlan) -> CurrentOptimizer:
    """The run's optimizer, whose state is still to be restored. Calls ``on_optimizer_built``."""
    was_rebuilt = TRAINED in plan.found.state
    current = CurrentOptimizer(model, _new_optimizer(job, model), _component(job).attributed, was_rebuilt)
    if not skips_on_device(current.optimizer):
        job.plugins.log.info(
            f"optimizer {job.config.optimizer.name} has no found_inf, with which it would skip a non-finite step by"
            " itself: the host reads one value a step",
            name="host_read",
        )
    job.plugins.adopt(job.plugins.extended_view(OptimizerView, current=current))
    _announce(job, current, plan.step)
    return current


def rebuild_optimizer(job: Job, current: CurrentOptimizer, train_step: TrainStep, reason: str) -> None:
    """Go on with an optimizer of the parameters that the model has and trains now. All processes call it together.

    Wrapper and compilation are made anew, too. Raises PluginError if the processes have different parameters, or if
    state of the optimizer cannot be carried over.
    """
    dist, model = job.dist, current.model
    old, names, as_built = current.optimizer, current.names, current.as_built
    for parameter in model.parameters():
        parameter.grad = None
    model.to(dist.device)
    checkpoint_activations(job.spec, model, job.runtime.checkpointing)
    _refuse_different(job, model)
    refuse_unsharded(dist, model)
    current.replace(_new_optimizer(job, model))
    compute = build_step(job.spec.registry, job.config, model)
    train_step.renew(current.optimizer, train_step.module, compute)
    dist.release_wrapped()  # nothing refers to the wrapper any more
    _announce(job, current, job.state.step)
    new = _attributed(job, lambda: carry_over(old, names, as_built, current.optimizer, model))
    train_step.renew(current.optimizer, dist.wrap(train_step.module), compute)
    recompile_model(model, job.runtime.compile_plan)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    job.plugins.log.info(
        f"the optimizer is rebuilt: {reason}; it trains {trained} parameters, {new} of them anew",
        name="optimizer_rebuilt",
        trained=trained,
        new=new,
    )


def _refuse_different(job: Job, model: torch.nn.Module) -> None:
    """Raise PluginError, once, if the model is not the same on all processes."""
    named = model.named_parameters()
    mine = digest({name: (list(p.shape), str(p.dtype), p.requires_grad) for name, p in named})
    if len(set(job.dist.gather(mine, patient=False))) == 1:
        return
    if not job.dist.is_main:
        raise RankFailed("the models of the processes differ: process 0 says so", exit_code=PluginError.exit_code)
    raise PluginError(
        "the optimizer cannot be rebuilt: the processes have models with different parameters",
        hint='a plugin changes the model on every process: ranks = "all"',
    )


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
    return _attributed(job, lambda: flatten_optimizer(current.optimizer, current.model, current.as_built))


def _attributed(job: Job, work: Callable[[], T]) -> T:
    """The result of ``work`` on the optimizer's state, whose failure becomes a PluginError that names the component."""
    part = _component(job)
    try:
        return part.attributed(work, "has state that cannot be read")()
    except CheckpointError as error:
        raise PluginError(*(p._replace(message=f"{part.label}: {p.message}") for p in error.problems)) from error
