"""The engine's own step on rows that are made up: on fake tensors to see memory, on real ones to see time.

What is rehearsed is what runs: the model's component, the optimizer, precision, checkpointing, accumulation, clipping.
Plugins, the data and other processes are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from attrs import define, field, frozen

from gpt_simple.config.schema import Config
from gpt_simple.data.loader import StepData
from gpt_simple.distributed.process_group import World
from gpt_simple.engine.compile import CompilePlan, compile_model
from gpt_simple.engine.optimizers import skips_on_device
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.trainer import Trainer
from gpt_simple.engine.views import EngineRun
from gpt_simple.errors import PluginError
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.components import Registry
from gpt_simple.model.shape import padded
from gpt_simple.plugin_host.dispatch import Calls, Policy
from gpt_simple.plugin_host.loading import LoadedPlugin

EAGER = CompilePlan(False, "model", "", None)


@define(eq=False)
class MadeUpRows:
    """A loader that hands out the same rows again and again."""

    config: Config
    vocab_size: int
    device: torch.device
    micro_batches: int = 1
    wait_seconds: float = 0.0
    _batch: Batch = field(init=False)

    def __attrs_post_init__(self) -> None:
        rows, length = self.config.training.per_device_batch_size, self.config.data.max_length
        ids = torch.randint(self.vocab_size, (rows, length), device=self.device)
        labels = torch.randint(self.vocab_size, (rows, length), device=self.device)
        masked = self.config.data.document_mask
        positions = torch.arange(length, device=self.device).repeat(rows, 1) if masked else None
        documents = torch.zeros_like(ids) if masked else None
        self._batch = Batch(ids, labels, positions, documents, 0, rows * length)

    @property
    def batch(self) -> Batch:
        return self._batch

    def next_step(self) -> StepData:
        """A step of ``micro_batches``."""
        count = self.micro_batches
        rows, length = self._batch.input_ids.shape
        return StepData((self._batch,) * count, 0, count * rows, count * rows * length, count * rows * length)


@frozen(eq=False)
class Rehearsal:
    """A model, its optimizer and a trainer that never writes anything."""

    run: EngineRun
    calls: Calls
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Trainer
    rows: MadeUpRows

    @classmethod
    def prepare(
        cls,
        config: Config,
        registry: Registry,
        precision: Precision,
        *,
        vocab_size: int,
        compiling: CompilePlan = EAGER,
        as_compiled: bool = False,
        fake_tensors: bool = False,
    ) -> Rehearsal:
        """Build everything on the precision's device. ``vocab_size`` is the tokenizer's.

        ``fake_tensors``: this is called in a mode in which tensors have no memory. ``as_compiled`` takes the formulas
        that the model would have compiled, but runs them eagerly.
        """
        device = precision.device
        factory = registry.get("model", config.model.name).build
        rows = getattr(config.model, "vocab_size", None) or padded(vocab_size)
        with torch.device("meta" if fake_tensors else device):
            model: torch.nn.Module = factory(config.model, vocab_size=rows, max_length=config.data.max_length)
        if fake_tensors:
            _to_empty(model, device)
        set_checkpointing = getattr(model, "set_activation_checkpointing", None)
        if set_checkpointing is not None:
            set_checkpointing(int(config.training.gradient_checkpointing))
        optimizer = registry.get("optimizer", config.optimizer.name).build(model, config.optimizer, device)
        compile_model(model, compiling)
        run = EngineRun(config, Path(config.training.output_dir), World(0, 1, device, None), precision)
        run._model = model
        run._wrapped = _AsCompiled(model) if as_compiled else model
        run.known = {"tokens_per_step": 0}
        calls = run.calls = Calls(Policy(_no_plugin))
        accumulation = config.training.gradient_accumulation_steps
        made_up = MadeUpRows(config, min(vocab_size, rows), device, accumulation)
        rate = optimizer.param_groups[0].get("lr", 0.0)
        trainer = (_NeverSkips if fake_tensors else Trainer)(
            run=run,
            calls=calls,
            model=model,
            wrapped=run._wrapped,
            optimizer=optimizer,
            schedule=lambda step: rate,
            loader=_any(made_up),
            store=_any(None),
            owner=_any(None),
            state=_any(None),
            skips_on_device=skips_on_device(optimizer),
        )
        model.train()
        return cls(run, calls, model, optimizer, trainer, made_up)

    def step(self) -> None:
        """One optimizer step."""
        self.trainer.step(is_last=False)

    def state_bytes(self) -> int:
        """Bytes of a checkpoint's tensors, once there was a step."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held = {id(tensor): tensor for tensor in (*self.model.state_dict(keep_vars=True).values(), *states)}
        return sum(tensor.nbytes for tensor in held.values() if isinstance(tensor, torch.Tensor))

    def evaluate(self) -> torch.Tensor:
        """The forward pass of an evaluation's batch."""
        with self.run.evaluating():
            return self.run.loss(self.rows.batch)


class _NeverSkips(Trainer):
    """Where the host decides whether to skip a step: a fake tensor has no value that it could read."""

    def _clip(self) -> tuple[torch.Tensor, Any]:
        norm, skipped = super()._clip()
        return norm, skipped if self.skips_on_device else False


class _AsCompiled(torch.nn.Module):
    """The model, told that it is being compiled: it then chooses the formulas that a compiler would fuse."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        with patch("torch.compiler.is_compiling", return_value=True):
            loss: torch.Tensor = self.model(*arguments)
        return loss


def _to_empty(model: torch.nn.Module, device: torch.device) -> None:
    """Module.to_empty, which cannot replace fake tensors. Tensors that are shared stay shared."""
    made: dict[int, torch.Tensor] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                made[id(tensor)] = torch.nn.Parameter(made[id(tensor)], tensor.requires_grad)
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = empty(tensor)  # type: ignore[assignment]


def _no_plugin(plugin: LoadedPlugin, hook: str, error: BaseException) -> None:
    raise PluginError(f"{hook} was called in a rehearsal, which has no plugins")


def _any(value: Any) -> Any:
    """What a trainer holds and a rehearsal never reaches."""
    return value
