"""The norm before any edit: the right value, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Linear, Parameter

from gpt_simple.engine.gradients import UneditedNorm, total_norm
from gpt_simple.errors import PluginError


def parameters() -> list[Parameter]:
    layer = Linear(3, 2)
    layer(torch.ones(4, 3)).square().sum().backward()
    return [*layer.parameters(), Parameter(torch.ones(2))]


def test_the_norm_is_computed_once_and_kept() -> None:
    held = parameters()
    expected = torch.cat([p.grad.flatten() for p in held if p.grad is not None]).norm()
    norm = UneditedNorm(held)
    first = norm()
    torch.testing.assert_close(first, expected)
    held[0].grad = None
    assert norm() is first


def gradients(held: list[Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in held if p.grad is not None]


EDITS: dict[str, Callable[[list[Parameter]], object]] = {
    "in place": lambda held: gradients(held)[1].mul_(2),
    "one element": lambda held: gradients(held)[0].view(-1)[0].fill_(1),
    "many at once": lambda held: torch._foreach_mul_(gradients(held), 2.0),
    "clipped": lambda held: torch.nn.utils.clip_grad_norm_(held, 0.1),
    "replaced": lambda held: setattr(held[0], "grad", torch.zeros(2, 3)),
    "removed": lambda held: setattr(held[0], "grad", None),
    "added": lambda held: setattr(held[2], "grad", torch.ones(2)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_read_after_an_edit_is_refused(edit: str) -> None:
    held = parameters()
    norm = UneditedNorm(held)
    EDITS[edit](held)
    with pytest.raises(PluginError, match="read after gradients were edited or used; read it first"):
        norm()


def test_a_read_of_the_gradients_is_no_edit() -> None:
    held = parameters()
    norm = UneditedNorm(held)
    assert torch.equal(total_norm(held), norm())
