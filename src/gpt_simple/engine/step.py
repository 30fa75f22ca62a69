"""One optimizer step: the model, the optimizer and the process group, but no data source, file, plugin or log.

The trainer, the memory prediction and the throughput estimate all use it. Nothing here reads a device tensor on the
host, except for an optimizer that cannot skip a step by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from attrs import define

from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.optimizers import skips_on_device
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.rng import BatchSeeder
from gpt_simple.engine.schedules import Schedule
from gpt_simple.hooks.batch import Batch

OnBatch = Callable[[int, Batch], None]
OnGradients = Callable[[], torch.Tensor | None]

_CLIP_EPSILON = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``: the norm afterwards is the limit or slightly less."""


SKIP_REQUESTED = 4096.0
"""What a request of ``skip_step`` adds to ``StepResult.skipped``. All processes together add less for a gradient."""


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The model's cross-entropy in nats, summed over the batch's target tokens."""
    documents = () if batch.document_ids is None else (batch.position_ids, batch.document_ids)
    loss = model(batch.input_ids, batch.labels, *documents)
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        given = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TypeError(f"the model returned {given}; expected the summed loss, a 0-d tensor")
    return loss


def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """One update of the weights."""
    optimizer.step()


class StepResult(NamedTuple):
    """What a step leaves on the device."""

    loss: torch.Tensor
    """The summed loss of this process, in nats."""
    norm: torch.Tensor
    """The norm of the gradients before clipping."""
    skipped: torch.Tensor
    """0.0 if the weights were updated. Less than SKIP_REQUESTED: the gradients were not finite, and no plugin asked."""


@define(slots=False, eq=False, kw_only=True)
class TrainStep:
    """One optimizer step over its micro-batches: ``step(number, batches, targets)``.

    ``wrapped`` is ``model`` or the module that reduces its gradients over the processes of ``dist``. A step whose
    gradient is not finite is skipped: by the optimizer on the device if it can, else by the host, which reads one value
    a step. ``fake_tensors``: there is no value to read, and no step is skipped on the host. ``summed_loss``,
    ``backward`` and ``step_optimizer`` are the functions of these names, which may attribute a failure to a component.
    """

    model: torch.nn.Module
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    dist: ProcessGroup
    seed: int
    max_grad_norm: float | None
    fake_tensors: bool = False
    summed_loss: Callable[[torch.nn.Module, Batch], torch.Tensor] = summed_loss
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    step_optimizer: Callable[[torch.optim.Optimizer], None] = step_optimizer

    def __attrs_post_init__(self) -> None:
        self._reseed = BatchSeeder(self.seed, self.dist.device)
        self.renew(self.optimizer, self.wrapped)

    def renew(self, optimizer: torch.optim.Optimizer, wrapped: torch.nn.Module) -> None:
        """Train the parameters that the model has and trains now, with their optimizer and the module around them."""
        self.optimizer, self.wrapped = optimizer, wrapped
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._skips_on_device = skips_on_device(optimizer)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy of a batch, by the module that is trained."""
        return self.summed_loss(self.wrapped, batch)

    def __call__(
        self,
        number: int,
        batches: Sequence[Batch],
        targets: int,
        *,
        on_batch: OnBatch | None = None,
        on_gradients: OnGradients | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """Run step ``number``, from 1, over ``batches``; ``targets`` counts their target tokens on all processes.

        ``on_batch(index, batch)`` runs before each forward pass. ``on_gradients()`` runs on reduced, unscaled
        gradients, which it may edit; it returns a flag that skips the step, or None. All processes pass it or none.
        ``before_update()`` runs once nothing but the update is left.
        """
        loss = self._accumulate(batches, targets, on_batch)
        self.precision.scaler.unscale_(self.optimizer)
        flag = on_gradients() if on_gradients is not None else None
        norm, skipped = self._clip()
        found_inf = skipped
        if on_gradients is not None:
            # On all processes: one without a flag takes part in the sum, for which the others wait.
            skipped = self.dist.sum(skipped if flag is None else torch.add(skipped, flag, alpha=SKIP_REQUESTED))
            found_inf = (skipped > 0).float()
        if before_update is not None:
            before_update()
        self._update(number, found_inf)
        return StepResult(loss, norm, skipped)

    def _accumulate(self, batches: Sequence[Batch], targets: int, on_batch: OnBatch | None) -> torch.Tensor:
        """Forward and backward of all micro-batches; the summed loss."""
        # The summed loss over the step's target tokens of all processes; DDP will divide by the world size.
        scale = self.dist.size / max(1, targets)
        last, loss = len(batches) - 1, None
        for index, batch in enumerate(batches):
            if on_batch is not None:
                on_batch(index, batch)
            self._reseed(batch.first_sample)
            with self.dist.accumulating(self.wrapped, index == last):
                with self.precision.autocast():
                    nats = self.summed_loss(self.wrapped, batch)
                self.backward(self.precision.scaler.scale(nats * scale))
            loss = nats.detach() if loss is None else loss + nats.detach()
        assert loss is not None
        return loss

    def _clip(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients' norm before clipping, and 1.0 if it is not finite; both stay on the device."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.max_grad_norm is not None:
            if self._skips_on_device:
                # The fused optimizer divides by this while it reads the gradients anyway: no extra pass.
                divisor = ((norm + _CLIP_EPSILON) / self.max_grad_norm).clamp_(min=1.0)
                self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            else:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, norm)
        # A finite number less itself is 0, anything else is NaN: two kernels, where isfinite takes four.
        return norm, torch.nan_to_num_((norm - norm).float(), nan=1.0)

    def _update(self, number: int, skipped: torch.Tensor) -> None:
        """Step the optimizer at the schedule's rate times each group's ``lr_scale``, unless ``skipped``."""
        rate = self.schedule(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        if self._skips_on_device:
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.step_optimizer(self.optimizer)
        elif self.fake_tensors or not bool(skipped):
            self.step_optimizer(self.optimizer)
        if self.precision.scaler.is_enabled():
            self.precision.scaler.update()
        # As zero_grad(set_to_none=True) does, without its loop over groups and its profiler record.
        for parameter in self._parameters:
            parameter.grad = None

    def not_trained(self, *, failed: bool = False) -> list[str]:
        """What was changed in the model since the step was made, and has no effect on it. One line for each name.

        Of a step that has ``failed`` also what is frozen: several processes wait for its gradients.
        """
        trained, found = {id(parameter) for parameter in self._parameters}, set()
        lines = []
        for name, parameter in self.model.named_parameters():
            found.add(id(parameter))
            if parameter.requires_grad and id(parameter) not in trained:
                lines.append(f"{name} requires gradients now, and is not trained")
            elif failed and self.dist.size > 1 and not parameter.requires_grad and id(parameter) in trained:
                lines.append(f"{name} is frozen now, and the other processes wait for its gradients")
        if gone := len(trained - found):
            lines.append(f"{gone} parameters that are trained are no longer in the model")
        return lines

    def warm_up_ddp(self, batch: Batch) -> None:
        """One forward and backward whose result is discarded.

        DDP rebuilds its buckets after its first backward, in the order in which gradients were ready. With three or
        more processes the buckets decide in which order numbers are added. So without this a resumed run would differ
        in its last digits from one that was not interrupted.
        """
        with self.precision.autocast():
            nats = self.summed_loss(self.wrapped, batch)
        self.backward(nats)
        self.optimizer.zero_grad(set_to_none=True)
