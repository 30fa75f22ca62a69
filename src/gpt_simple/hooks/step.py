"""The step as a component: what makes the gradients of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from gpt_simple.hooks.batch import Batch


class Backward(Protocol):
    """Forward and backward of one micro-batch, by the engine.

    It adds to ``p.grad`` of the parameters. Over all micro-batches of a step this gives the gradient of the mean loss
    over the step's target tokens on all processes. Gradients are reduced over processes in a call with ``is_last``,
    which must be the last call of each pass over the micro-batches. Before such a call ``p.grad`` has this process's
    part only. Wrapping, autocast and loss scaling are the engine's. Dropout depends on the batch's ``first_sample``
    alone, so a second pass over a micro-batch has the same dropout.

    Returns the micro-batch's summed loss: nats, 0-d, on the device, detached.
    """

    def __call__(self, batch: Batch, *, is_last: bool) -> Tensor: ...


class Step(Protocol):
    """A component of kind ``step``: leaves the gradients of one optimizer step in ``p.grad``.

    ``batches`` are this process's micro-batches. Every process makes the same passes over them. Weights that the step
    changes on the way are put back before it returns. Then the engine unscales, calls ``on_gradients``, clips and
    updates. Returns the loss that is logged: nats summed over the micro-batches, 0-d, on the device.
    """

    def __call__(self, batches: Sequence[Batch], backward: Backward) -> Tensor: ...


def accumulate(batches: Sequence[Batch], backward: Backward) -> Tensor:
    """One pass over all micro-batches, which is the step ``standard``. Returns their summed loss."""
    last, loss = len(batches) - 1, None
    for index, batch in enumerate(batches):
        nats = backward(batch, is_last=index == last)
        loss = nats if loss is None else loss + nats
    assert loss is not None, "a step has micro-batches"
    return loss
