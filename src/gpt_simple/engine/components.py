"""The configured components as the engine calls them: a failure becomes a PluginError that names the component."""

from __future__ import annotations

from typing import Any

import torch

from gpt_simple.config.schema import Config
from gpt_simple.engine.step import step_optimizer, summed_loss
from gpt_simple.hooks.components import Registry


def guarded(registry: Registry, config: Config, model: torch.nn.Module) -> torch.nn.Module:
    """The configured ``model`` as the engine calls it: a failure of its methods is attributed to the component."""
    return registry.get("model", config.model.name).guarded(model)


def attributed_calls(registry: Registry, config: Config) -> dict[str, Any]:
    """The calls of a train step into the configured components, which attribute their failures."""
    model, optimizer = registry.get("model", config.model.name), registry.get("optimizer", config.optimizer.name)
    return {
        "summed_loss": model.attributed(summed_loss, "failed in forward"),
        "backward": model.attributed(torch.Tensor.backward, "failed in backward"),
        "step_optimizer": optimizer.attributed(step_optimizer, "failed in step"),
    }
