"""The optimizer component ``adamw``, how the engine skips a step of any optimizer, and the one that a run steps now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real

import torch
from attrs import define, field

from gpt_simple.checkpoint.sharded import is_sharded
from gpt_simple.checkpoint.state import OptimizerAsBuilt
from gpt_simple.config.schema import OptimizerConfig
from gpt_simple.engine.optimizer_modes import Attributed, evaluation_weights, has_modes
from gpt_simple.errors import PluginError


def adamw(model: torch.nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2019); only matrices and embeddings are decayed, not gains and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer divides gradients by ``grad_scale`` and skips a step if ``found_inf``, both tensors.

    Torch's fused optimizers do that for a GradScaler. The engine clips with the one and skips steps that are not finite
    with the other: without a pass over the gradients, and without reading the device.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@define(eq=False)
class CurrentOptimizer:
    """The optimizer that a run steps now. Views and checkpoints read it here.

    ``attributed`` makes a failure name the optimizer's component. ``as_built`` has what is no state of it: what the
    component and ``on_optimizer_built`` have set.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    attributed: Attributed
    was_rebuilt: bool = False
    """Whether the run has built it anew at some step: which parameters are trained no longer follows from its start."""
    names: Mapping[int, str] = field(init=False)
    """The name of each parameter of the model when it was built, by ``id``."""
    as_built: OptimizerAsBuilt = field(init=False)
    _evaluates: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._use(self.optimizer)

    def replace(self, optimizer: torch.optim.Optimizer) -> None:
        """Step ``optimizer`` from now on."""
        self.was_rebuilt = True
        self._use(optimizer)

    def _use(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.settle()

    def settle(self) -> None:
        """Count what the optimizer has now as built. Raises PluginError for an ``lr_scale`` that is no factor."""
        for index, group in enumerate(self.optimizer.param_groups):
            scale = group.get("lr_scale", 1.0)
            if not isinstance(scale, Real) or not 0.0 <= float(scale) < math.inf:
                raise PluginError(
                    f"group {index} of the optimizer has the lr_scale {scale!r}",
                    hint="expected a number from 0, by which the schedule's rate is multiplied",
                )
        self.as_built = OptimizerAsBuilt.of(self.optimizer)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model has the optimizer's weights for evaluation, if it has others than for training."""
        if self._evaluates:
            yield
            return
        self._evaluates = True
        try:
            with evaluation_weights(self.optimizer, self.attributed):
                yield
        finally:
            self._evaluates = False

    def weights_for_evaluation(self) -> dict[str, torch.Tensor] | None:
        """A copy in host memory of each parameter as it is evaluated, None if it is evaluated as it is trained."""
        if not has_modes(self.optimizer):
            return None
        with self.evaluating():
            # Of a sharded one the copy stays on its device, where it is gathered.
            return {
                name: p.detach().clone() if is_sharded(p) else p.detach().to("cpu", copy=True)
                for name, p in self.model.named_parameters()
            }
