"""From a micro-batch to what is trained on: the model's own loss, or a component's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import evolve, frozen

from gpt_simple.config.schema import Config
from gpt_simple.errors import ConfigError, PluginError
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.components import Registry
from gpt_simple.hooks.losses import Loss, Losses

LossesOf = Callable[[torch.nn.Module, Batch], torch.Tensor | Losses]

_TAKEN = ("loss", "lr", "grad_norm", "skipped_steps", "not_finite_on")
"""Names under ``train/`` that no term of the loss can have."""


def losses_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor | Losses:
    """The model's cross-entropy in nats, summed over the batch's target tokens, with further terms if it has any."""
    documents = () if batch.document_ids is None else (batch.position_ids, batch.document_ids)
    weights = {} if batch.weights is None else {"weights": batch.weights}
    return checked_losses(model(batch.input_ids, batch.labels, *documents, **weights), "the model")


def checked_losses(losses: torch.Tensor | Losses, giver: str) -> torch.Tensor | Losses:
    """``losses`` as the engine can use them. Raises TypeError for anything else."""
    if isinstance(losses, torch.Tensor) and not losses.ndim:
        return losses
    if not isinstance(losses, Losses):
        raise TypeError(f"{giver} returned {described(losses)}; expected the summed loss, a 0-d tensor, or Losses")
    if not isinstance(losses.terms, Mapping):
        raise TypeError(f"{giver} returned {described(losses.terms)} as the terms of Losses; expected a mapping")
    for name, value in (("cross_entropy", losses.cross_entropy), *losses.terms.items()):
        if not isinstance(value, torch.Tensor) or value.ndim:
            raise TypeError(f"{giver} returned {described(value)} as {name} of Losses; expected a 0-d tensor")
        if not isinstance(name, str) or not name or name in _TAKEN:
            raise TypeError(f"{giver} returned a term named {name!r}; expected another name, which train/ can have")
    return losses


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The model's cross-entropy in nats, summed over the batch's target tokens without their weights."""
    losses = losses_of(model, batch if batch.weights is None else evolve(batch, weights=None))
    return losses if isinstance(losses, torch.Tensor) else losses.cross_entropy


def described(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def total_of(losses: torch.Tensor | Losses) -> torch.Tensor:
    """What is trained on."""
    return losses if isinstance(losses, torch.Tensor) else losses.total


def standard(model: torch.nn.Module, config: Config) -> None:
    """The loss component ``standard``: the model's own."""


@frozen(eq=False)
class TrainedLoss:
    """The configured loss: ``of(wrapped, batch)``, where ``wrapped`` is ``module`` or a wrapper of it.

    ``module`` is the model itself if the model computes its loss.
    """

    module: torch.nn.Module
    of: LossesOf

    @classmethod
    def build(cls, registry: Registry, config: Config, model: torch.nn.Module) -> TrainedLoss:
        """Build the component. Raises ConfigError if ``model`` does not give what it needs."""
        part, owner = registry.get("loss", config.training.loss), registry.get("model", config.model.name)
        loss: Loss | None = part.build(model, config)
        if loss is None:
            return cls(model, owner.attributed(losses_of, "failed in forward"))
        if loss.needs not in ("logits", "hidden"):
            raise PluginError(f"{part.label} needs {loss.needs!r}", hint='expected "logits" or "hidden"')
        if loss.needs == "hidden" and "hidden" not in inspect.signature(model.forward).parameters:
            raise ConfigError(
                f"the loss {config.training.loss!r} needs hidden states, and the forward of the model"
                f' {config.model.name!r} has no parameter "hidden"',
                key="training.loss",
                hint="choose another loss or model",
            )
        options = {"hidden": True} if loss.needs == "hidden" else {}

        def compute(output: torch.Tensor, batch: Batch) -> Losses:
            losses = checked_losses(loss(output, batch), "it")
            if not isinstance(losses, Losses):
                raise TypeError("it returned a tensor; expected Losses")
            return losses

        forward = owner.attributed(model, "failed in forward")
        module = _WithLoss(model, forward, options, part.attributed(compute, "failed"))
        return cls(module, lambda wrapped, batch: wrapped(batch))


class _WithLoss(torch.nn.Module):
    """The model and its loss as one module, so that a wrapper sees one forward pass."""

    def __init__(
        self,
        model: torch.nn.Module,
        forward: Callable[..., torch.Tensor],
        options: dict[str, Any],
        loss: Callable[[torch.Tensor, Batch], Losses],
    ) -> None:
        super().__init__()
        self.model = model
        self._parts = forward, options, loss  # in a tuple: the forward may be the model itself

    def forward(self, batch: Batch) -> Losses:
        documents = () if batch.document_ids is None else (batch.position_ids, batch.document_ids)
        forward, options, loss = self._parts
        return loss(forward(batch.input_ids, None, *documents, **options), batch)
