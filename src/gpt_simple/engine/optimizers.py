"""The optimizer component ``adamw``, and how the engine skips a step of any optimizer."""

from __future__ import annotations

import torch

from gpt_simple.config.schema import OptimizerConfig


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
