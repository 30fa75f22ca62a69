"""Fused optimizers skip and clip on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt_simple.engine.optimizers import skips_on_device


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_fused_optimizers_of_torch_clip_and_skip_on_the_device(make: Any) -> None:
    """The engine never clips for them: one that took no notice of ``grad_scale`` would train unclipped."""
    start, gradient = torch.ones(8), torch.linspace(1.0, 4.0, 8)
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    plain, scaled, skipped = (make([parameter], lr=0.1, fused=True) for parameter in parameters)
    assert all(skips_on_device(optimizer) for optimizer in (plain, scaled, skipped))
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = gradient.clone()
        parameters[0].grad /= 5
        scaled.grad_scale, scaled.found_inf = torch.tensor(5.0), torch.tensor(0.0)
        skipped.grad_scale, skipped.found_inf = torch.tensor(5.0), torch.tensor(1.0)
        for optimizer in (plain, scaled, skipped):
            optimizer.step()
    torch.testing.assert_close(parameters[1], parameters[0])
    assert torch.equal(parameters[2], start)
