"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled", algorithm 1)."""

import math
from typing import Any

import torch


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW on a sequence z, evaluated at its weighted average x; gradients are taken between the two, at y.

    The parameters hold y = (1 - beta1) z + beta1 x in train mode and x in eval mode. With the rate r of a step, which
    includes Adam's bias correction, and c = r^2 over the sum of all r^2 so far::

        z <- z - r (grad(y) / (sqrt(v) + eps) + weight_decay y)        x <- (1 - c) x + c z
    """

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "evaluates": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["evaluates"]:
                raise RuntimeError("the optimizer is in eval mode: call train() before step()")
            for y in group["params"]:
                if y.grad is not None:
                    self._update(y, y.grad, self.state[y], group)

    def _update(self, y: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, weights=0.0, z=y.clone(), exp_avg_sq=torch.zeros_like(y))
        z, v, (beta1, beta2) = state["z"], state["exp_avg_sq"], group["betas"]
        state["step"] += 1
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"])
        state["weights"] += rate**2
        c = rate**2 / state["weights"] if rate else 0.0
        direction = (grad / v.sqrt().add_(group["eps"])).add_(y, alpha=group["weight_decay"])
        # x is not stored: it follows from y and z, so y is moved as x and z would move it.
        y.lerp_(z, c).add_(direction, alpha=rate * (beta1 * (1 - c) - 1))
        z.sub_(direction, alpha=rate)

    def train(self) -> None:
        self._move(evaluates=False)

    def eval(self) -> None:
        self._move(evaluates=True)

    @torch.no_grad()
    def _move(self, evaluates: bool) -> None:
        for group in (group for group in self.param_groups if group["evaluates"] is not evaluates):
            beta1, group["evaluates"] = group["betas"][0], evaluates
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], 1 - 1 / beta1 if evaluates else 1 - beta1)


def build(model: torch.nn.Module, config: Any, device: torch.device) -> ScheduleFreeAdamW:
    """The component. As with ``adamw``, only matrices and embeddings are decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}]
    return ScheduleFreeAdamW(groups, config.learning_rate, (config.beta1, config.beta2), config.eps)
