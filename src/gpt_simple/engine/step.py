"""One optimizer step: the model, the optimizer and the process group, but no data source, file, plugin or log.

The trainer, the memory prediction and the throughput estimate all use it. Nothing here reads a device tensor on the
host, except for an optimizer that cannot skip a step by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from attrs import Factory, define, field

from gpt_simple.config.schema import Config
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.casts import WeightCasts
from gpt_simple.engine.gradients import UneditedNorm, total_norm
from gpt_simple.engine.losses import LossesOf, described, losses_of, summed_loss, total_of
from gpt_simple.engine.optimizers import skips_on_device
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.rng import BatchSeeder
from gpt_simple.engine.schedules import Schedule
from gpt_simple.errors import PluginError
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.losses import Losses
from gpt_simple.hooks.step import Step, accumulate

OnBatch = Callable[[int, Batch], None]
OnGradients = Callable[[torch.Tensor, float, UneditedNorm], torch.Tensor | None]

_CLIP_EPSILON = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``: the norm afterwards is the limit or slightly less."""


def standard(model: torch.nn.Module, config: Config) -> Step:
    """The step component ``standard``: one pass over the micro-batches."""
    return accumulate


def _own_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Copy gradients out of the memory of a CUDA graph, whose next replay would write over them."""
    of_graph = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    if of_graph:
        own = [torch.empty_like(gradient) for gradient in of_graph.values()]
        torch._foreach_copy_(own, list(of_graph.values()))
        for parameter, gradient in zip(of_graph, own, strict=True):
            parameter.grad = gradient


def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """One update of the weights."""
    optimizer.step()


class StepResult(NamedTuple):
    """What a step leaves on the device."""

    loss: torch.Tensor
    """The summed cross-entropy of this process, in nats."""
    terms: Mapping[str, torch.Tensor]
    """The summed further terms of the loss by name."""
    norm: torch.Tensor
    """The norm of the gradients before clipping."""
    learning_rate: float
    skipped: torch.Tensor
    """0-d: 0.0 if the weights were updated."""
    not_finite: torch.Tensor
    """0-d: above 0 if a gradient was not finite."""
    requests: torch.Tensor | None
    """Which skips were requested: the vectors of ``on_gradients``, summed over processes."""


@define(eq=False)
class Passes:
    """The passes of one step's component; implements ``gpt_simple.hooks.step.Backward``.

    ``on_batch`` is called in the first pass over a micro-batch.
    """

    _step: TrainStep
    _share: float
    _batches: Sequence[Batch]
    _on_batch: OnBatch | None
    reduced: bool = field(default=False, init=False)
    """Whether the last call has reduced the gradients over processes."""
    failure: BaseException | None = field(default=None, init=False)
    """What a call has raised."""
    terms: dict[str, torch.Tensor] = field(factory=dict, init=False)
    """The further terms of the loss, summed over the first passes."""
    _passed: set[int] = field(factory=set, init=False)
    _scaled: bool = field(default=True, init=False)

    def __call__(self, batch: Batch, *, is_last: bool) -> torch.Tensor:
        try:
            index = None if self._on_batch is None else self._first_pass(batch)
            if index is not None and self._on_batch is not None:
                self._step.casts.drop()  # it may change weights, or evaluate with others
                self._on_batch(index, batch)
                self._step.casts.renew()
            self.scale_gradients(True)
            losses = self._step.forward_backward(batch, self._share, is_last=is_last)
        except BaseException as error:
            self.failure = error
            raise
        self.reduced = is_last
        if is_last:
            self.scale_gradients(False)
        if isinstance(losses, torch.Tensor):
            return losses.detach()
        if index is not None or (self._on_batch is None and self._first_pass(batch) is not None):
            for name, term in losses.terms.items():
                earlier = self.terms.get(name)
                self.terms[name] = term.detach() if earlier is None else earlier + term.detach()
        return losses.cross_entropy.detach()

    def _first_pass(self, batch: Batch) -> int | None:
        """The place of a micro-batch in the step in the first pass over it, afterwards None."""
        for index, each in enumerate(self._batches):
            if each is batch and index not in self._passed:
                self._passed.add(index)
                return index
        return None

    def scale_gradients(self, scaled: bool) -> None:
        """Bring all gradients to the loss scale of fp16, or back, where a component may read them in between."""
        if self._step.hides_scale and scaled is not self._scaled:
            self._step.scale_gradients(scaled)
            self._scaled = scaled


@define(slots=False, eq=False, kw_only=True)
class TrainStep:
    """One optimizer step over its micro-batches: ``step(number, batches, targets)``.

    ``wrapped`` is ``model`` or the module that reduces its gradients over the processes of ``dist``. A step whose
    gradient is not finite is skipped: by the optimizer on the device if it can, else by the host, which reads one value
    a step. ``fake_tensors``: there is no value to read, and no step is skipped on the host. ``module`` is what is
    wrapped: the model, or the model with a component's loss. ``graphs``: the model runs as CUDA graphs.
    ``losses_of``, ``summed_loss``, ``backward`` and ``step_optimizer`` are the functions of these names, and
    ``compute`` is the step component; they may attribute a failure to a component.
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
    graphs: bool = False
    module: torch.nn.Module = field(default=Factory(lambda self: self.model, takes_self=True))
    losses_of: LossesOf = losses_of
    summed_loss: Callable[[torch.nn.Module, Batch], torch.Tensor] = summed_loss
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    step_optimizer: Callable[[torch.optim.Optimizer], None] = step_optimizer
    compute: Step = accumulate
    compute_label: str = "step 'standard'"

    def __attrs_post_init__(self) -> None:
        self._reseed = BatchSeeder(self.seed, self.dist.device)
        self.renew(self.optimizer, self.wrapped, self.compute)

    def renew(self, optimizer: torch.optim.Optimizer, wrapped: torch.nn.Module, compute: Step) -> None:
        """Train the parameters that the model has and trains now, with what was made for them."""
        self.optimizer, self.wrapped, self.compute = optimizer, wrapped, compute
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._skips_on_device = skips_on_device(optimizer)
        # Another step may change weights between its passes, and another loss within one.
        is_plain = compute is accumulate and self.module is self.model
        self.casts = WeightCasts.of(self.model, self.precision.dtype if is_plain else None, keeps=self.graphs)
        # Another component may read gradients between its passes, and those must not be scaled for fp16.
        self.hides_scale = self.precision.scaler.is_enabled() and compute is not accumulate

    def loss(self, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy of a batch by the model itself, whatever loss it is trained on."""
        self._begin_graphs()
        return self.summed_loss(self.wrapped if self.module is self.model else self.model, batch)

    def forward_backward(self, batch: Batch, share: float, *, is_last: bool) -> torch.Tensor | Losses:
        """Forward and backward of one micro-batch, whose loss counts ``share`` times; what the model returned."""
        self._reseed(batch.first_sample)
        self._begin_graphs()
        fresh = [p for p in self._parameters if p.grad is None] if self.graphs else []
        with self.dist.accumulating(self.wrapped, is_last):
            with self.precision.autocast():
                losses = self.losses_of(self.wrapped, batch)
            self.backward(self.precision.scaler.scale(total_of(losses) * share))
        _own_gradients(fresh)
        return losses

    def _begin_graphs(self) -> None:
        """Let CUDA graphs write over what they gave before. By itself torch decides so in the middle of a backward."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def scale_gradients(self, up: bool) -> None:
        """Multiply all gradients by the loss scale of fp16, a power of two, or divide by it. No read of the device."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if gradients:
            scale = self.precision.scaler.scale(torch.ones((), device=gradients[0].device))
            torch._foreach_mul_(gradients, scale if up else scale.reciprocal())

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

        ``on_batch(index, batch)`` runs before each forward pass. ``on_gradients(loss, rate, norm)`` runs on reduced,
        unscaled gradients, which it may edit; it returns None or a float vector, in which a number above 0 skips the
        step. All processes pass it or none, and their vectors have one length. ``before_update()`` runs once nothing
        but the update is left.
        """
        rate = self.schedule(number)
        loss, terms = self._accumulate(batches, targets, on_batch)
        self.precision.scaler.unscale_(self.optimizer)
        requests = None
        if on_gradients is not None:
            requests = on_gradients(loss, rate, UneditedNorm(self._parameters))
        norm, not_finite = self._clip()
        skipped = not_finite
        if requests is not None:
            reasons = self.dist.sum(torch.cat([not_finite.reshape(1), requests]))
            not_finite, requests = reasons[0], reasons[1:]
            skipped = (reasons.sum() > 0).float()
        if before_update is not None:
            before_update()
        self._update(rate, skipped)
        return StepResult(loss, terms, norm, rate, skipped, not_finite, requests)

    def _accumulate(
        self, batches: Sequence[Batch], targets: int, on_batch: OnBatch | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The step's gradients, made by its component; the summed cross-entropy and the further terms of the loss."""
        # The summed loss over the step's target tokens of all processes; DDP will divide by the world size.
        passes = Passes(self, self.dist.size / max(1, targets), batches, on_batch)
        failure: BaseException | None = None
        try:
            with self.casts.ahead():
                loss = self.compute(batches, passes)
        except BaseException as error:
            # A failure of the engine's own part is not the component's.
            failure = passes.failure or error
        if failure is not None:
            raise failure
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            raise PluginError(
                f"{self.compute_label} returned {described(loss)}",
                hint="expected the summed loss of its micro-batches, a 0-d tensor",
            )
        if not passes.reduced:
            raise PluginError(
                f"{self.compute_label} left gradients that are not reduced over processes",
                hint="the last call of each pass over the micro-batches is backward(batch, is_last=True)",
            )
        passes.scale_gradients(True)
        return loss.detach(), passes.terms

    def _clip(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients' norm before clipping, and 1.0 if it is not finite; both stay on the device."""
        norm = total_norm(self._parameters)
        if self.max_grad_norm is not None:
            if self._skips_on_device:
                # The fused optimizer divides by this while it reads the gradients anyway: no extra pass.
                divisor = ((norm + _CLIP_EPSILON) / self.max_grad_norm).clamp_(min=1.0)
                self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            else:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, norm)
        # A finite number less itself is 0, anything else is NaN: two kernels, where isfinite takes four.
        not_finite = torch.nan_to_num_((norm - norm).float(), nan=1.0)
        if self.precision.scaler.is_enabled():
            # The norm may overflow over gradients that are finite, and only a lower scale ends such skips.
            for found in self.precision.scaler._found_inf_per_device(self.optimizer).values():
                torch.maximum(found, not_finite, out=found)
        return norm, not_finite

    def _update(self, rate: float, skipped: torch.Tensor) -> None:
        """Step the optimizer at the schedule's rate times each group's ``lr_scale``, unless ``skipped``."""
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
        with self.casts.ahead():
            with self.precision.autocast():
                losses = self.losses_of(self.wrapped, batch)
            self.backward(total_of(losses))
        self.optimizer.zero_grad(set_to_none=True)
