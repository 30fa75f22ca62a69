"""What is trained on beside the cross-entropy: further terms of a model, and the loss as a component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from gpt_simple.hooks.batch import Batch


class Losses(NamedTuple):
    """The cross-entropy of a micro-batch and further terms of its loss, all *summed* over the target tokens.

    Trained on is ``weight * cross_entropy`` plus all terms, each with the factor that it comes with. The engine divides
    by the step's target tokens, so a term that is no sum over tokens is multiplied by their number. ``train/loss`` and
    ``run.loss`` are ``cross_entropy`` alone; the term NAME is logged as ``train/NAME``, per target token. Tensors are
    0-d float32 on the device. A named tuple, because torch's compiler and wrappers see into one.
    """

    cross_entropy: Tensor
    terms: Mapping[str, Tensor]
    weight: float | Tensor = 1.0

    @property
    def total(self) -> Tensor:
        """What is trained on."""
        total = self.cross_entropy * self.weight
        for term in self.terms.values():
            total = total + term
        return total


class Loss(Protocol):
    """A component of kind ``loss``: the loss of a micro-batch from what the model makes of it.

    ``needs``: ``"logits"`` [B, T, V], which every model gives without labels, or ``"hidden"``, the states [B, T, C]
    from which a model makes logits; it gives them if its ``forward`` has a parameter ``hidden``. Nothing else is made.
    Called in autocast, inside the module that reduces gradients. Evaluation does not use it: ``run.loss`` is the
    model's own cross-entropy.
    """

    @property
    def needs(self) -> Literal["logits", "hidden"]: ...

    def __call__(self, output: Tensor, batch: Batch) -> Losses: ...
