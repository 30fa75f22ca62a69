"""The configured components as the engine calls them: a failure becomes a PluginError that names the component."""

from __future__ import annotations

from typing import Any

import torch

from gpt_simple.config.schema import Config
from gpt_simple.engine.losses import TrainedLoss, summed_loss
from gpt_simple.engine.step import step_optimizer
from gpt_simple.hooks.components import Registry
from gpt_simple.hooks.step import Step


def guarded(registry: Registry, config: Config, model: torch.nn.Module) -> torch.nn.Module:
    """The configured ``model`` as the engine calls it: a failure of its methods is attributed to the component."""
    return registry.get("model", config.model.name).guarded(model)


def build_step(registry: Registry, config: Config, model: torch.nn.Module) -> Step:
    """The step component, made for the parameters that ``model`` trains now."""
    part = registry.get("step", config.training.step)
    step: Step = part.attributed(part.build(model, config), "failed")
    return step


def attributed_calls(registry: Registry, config: Config, model: torch.nn.Module) -> dict[str, Any]:
    """The calls of a train step into the configured components, which attribute their failures."""
    owner, optimizer = registry.get("model", config.model.name), registry.get("optimizer", config.optimizer.name)
    loss = TrainedLoss.build(registry, config, model)
    return {
        "module": loss.module,
        "losses_of": loss.of,
        "summed_loss": owner.attributed(summed_loss, "failed in forward"),
        "backward": owner.attributed(torch.Tensor.backward, "failed in backward"),
        "step_optimizer": optimizer.attributed(step_optimizer, "failed in step"),
        "compute": build_step(registry, config, model),
        "compute_label": registry.get("step", config.training.step).label,
    }
