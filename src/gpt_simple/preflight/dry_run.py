"""The engine's own step on synthetic rows: on fake tensors to predict memory, on real ones to measure time.

The model's component, the optimizer, precision, checkpointing, accumulation and clipping are those of the run. Plugins,
the data and other processes are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from attrs import frozen

from gpt_simple.config.schema import Config
from gpt_simple.data.plan import BatchPlan
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.engine.compile import CompilePlan, compile_model
from gpt_simple.engine.components import attributed_calls, guarded
from gpt_simple.engine.evaluation import evaluation_mode
from gpt_simple.engine.optimizer_modes import enter_train_mode, evaluation_weights
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.step import OnBatch, OnGradients, StepResult, TrainStep
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.components import Registry
from gpt_simple.hooks.preflight import BatchStage
from gpt_simple.model.gpt import GPT
from gpt_simple.model.loss import summed_cross_entropy
from gpt_simple.model.shape import padded

EAGER = CompilePlan(False, "model", "", None)


@frozen(eq=False)
class DryRun:
    """A train step without a run around it, on one batch."""

    train_step: TrainStep
    batch: Batch
    evaluation_batch: Batch
    micro_batches: int

    @classmethod
    def prepare(
        cls,
        config: Config,
        registry: Registry,
        precision: Precision,
        *,
        vocab_size: int,
        stage: BatchStage | None = None,
        compile_plan: CompilePlan = EAGER,
        loss_function: Callable[..., torch.Tensor] = summed_cross_entropy,
        fake_tensors: bool = False,
        dist: ProcessGroup | None = None,
        stand_in: Callable[[GPT], None] | None = None,
    ) -> DryRun:
        """Build everything on the precision's device. ``vocab_size`` is the tokenizer's; ``dist`` has one process.

        The batches are those of ``stage``, by default of the steps after the warm-up stages.
        A model of the family ``gpt`` computes its loss with ``loss_function``, and ``stand_in`` may replace its parts.
        ``fake_tensors``: the caller is in a mode in which tensors have no memory and no values.
        """
        device = precision.device
        rows = getattr(config.model, "vocab_size", None) or padded(vocab_size)
        build_model = registry.get("model", config.model.name).build
        with torch.device("meta" if fake_tensors else device):
            model: torch.nn.Module = build_model(config.model, vocab_size=rows, max_length=config.data.max_length)
        if isinstance(model, GPT):
            model.set_loss_function(loss_function)
            if stand_in is not None:
                stand_in(model)
        if fake_tensors:
            _to_empty(model, device)
        set_checkpointing = getattr(guarded(registry, config, model), "set_activation_checkpointing", None)
        if set_checkpointing is not None:
            set_checkpointing(int(ActivationCheckpointing.of(config).setting))
        optimizer = registry.get("optimizer", config.optimizer.name).build(model, config.optimizer, device)
        enter_train_mode(optimizer)
        compile_model(model, compile_plan)
        rate = optimizer.param_groups[0].get("lr", 0.0)
        calls = attributed_calls(registry, config, model)
        train_step = TrainStep(
            model=model,
            wrapped=calls["module"],
            optimizer=optimizer,
            schedule=lambda step: rate,
            precision=precision,
            dist=dist or ProcessGroup(0, 1, device),
            seed=config.training.seed,
            max_grad_norm=config.optimizer.max_grad_norm,
            fake_tensors=fake_tensors,
            graphs=compile_plan.graphs,
            **calls,
        )
        guarded(registry, config, model).train()
        last = BatchPlan.of(config).stages[-1]
        stage = stage or last
        make = partial(synthetic_batch, min(vocab_size, rows), device, masked=config.data.document_mask)
        whole = make(last.rows, last.length)
        batch = whole if stage.length == last.length else make(stage.rows, stage.length)
        return cls(train_step, batch, whole, stage.accumulation)

    def step(
        self,
        micro_batches: int | None = None,
        *,
        on_batch: OnBatch | None = None,
        on_gradients: OnGradients | None = None,
    ) -> StepResult:
        """One optimizer step over as many micro-batches as the run has, or ``micro_batches``."""
        batches = [self.batch] * (micro_batches or self.micro_batches)
        targets = self.batch.targets * len(batches)
        return self.train_step(1, batches, targets, on_batch=on_batch, on_gradients=on_gradients)

    def evaluate(self) -> torch.Tensor:
        """The forward pass of an evaluation's batch."""
        step = self.train_step
        with evaluation_weights(step.optimizer), evaluation_mode(step.model, step.precision, step.seed):
            return step.loss(self.evaluation_batch)


def synthetic_batch(vocab_size: int, device: torch.device, rows: int, length: int, *, masked: bool) -> Batch:
    """A micro-batch of random tokens."""
    ids, labels = (torch.randint(vocab_size, (rows, length), device=device) for _ in range(2))
    positions = torch.arange(length, device=device).repeat(rows, 1) if masked else None
    documents = torch.zeros_like(ids) if masked else None
    return Batch(ids, labels, positions, documents, 0, rows * length)


def _to_empty(model: torch.nn.Module, device: torch.device) -> None:
    """Module.to_empty, which cannot replace fake tensors. Tensors that are shared stay shared."""
    replacements: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replacements:
                    empty = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, torch.nn.Parameter):
                        empty = torch.nn.Parameter(empty, tensor.requires_grad)
                    replacements[id(tensor)] = empty
                tensors[name] = replacements[id(tensor)]  # type: ignore[assignment]
