"""The summed cross-entropy: in chunks as in one piece, in every precision, with little memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_simple.model.loss import IGNORED, summed_cross_entropy, weighted_cross_entropy


def problem(tokens: int = 37, vocab: int = 50, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("rows", [1, 10, 37, 1000])
@pytest.mark.parametrize("bf16", [False, True])
def test_chunks_equal_one_piece(rows: int, bf16: bool) -> None:
    hidden, weight, labels = problem()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        expected = plain(hidden, weight, labels)
        actual = summed_cross_entropy(hidden, weight, labels, rows_per_chunk=rows)
    torch.testing.assert_close(actual, expected)
    scale = 0.37  # the caller divides by the tokens of the step
    expected_grads = torch.autograd.grad(expected * scale, (hidden, weight))
    actual_grads = torch.autograd.grad(actual * scale, (hidden, weight))
    for ours, theirs in zip(actual_grads, expected_grads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02 if bf16 else 1e-5, atol=0.02 if bf16 else 1e-5)


def test_rows_without_a_single_label_cost_nothing() -> None:
    hidden, weight, labels = problem()
    value = summed_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    value.backward()
    assert value.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_frozen_factors_get_no_gradient() -> None:
    hidden, weight, labels = problem()
    summed_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    hidden, weight, labels = problem()
    summed_cross_entropy(hidden.detach(), weight, labels).backward()
    assert hidden.grad is None
    assert weight.grad is not None


def test_no_tensor_of_the_size_of_all_logits_exists() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    tokens, vocab, width = 4096, 2048, 8
    hidden, weight, labels = problem(tokens, vocab, width)
    with Largest() as largest:
        summed_cross_entropy(hidden, weight, labels).backward()
    assert largest.elements < tokens * vocab / 4


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    hidden, weight, labels = problem()
    value = summed_cross_entropy(hidden, weight, labels)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_labels(fused: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 7, 8), torch.randn(11, 8)
    labels = torch.randint(11, (3, 7))
    labels[0, :3] = IGNORED
    factors = torch.rand(3, 7) * 3
    factors[1] = 0
    results = []
    for own in (True, False):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            if own:
                weighted, total = weighted_cross_entropy(*inputs, labels, factors, fused=fused, rows_per_chunk=4)
                assert not total.requires_grad
            else:
                logits = F.linear(*inputs).float().flatten(0, 1)
                nats = F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORED)
                weighted, total = (nats * factors.flatten()).sum(), nats.sum()
        (weighted * 0.3).backward()
        results.append([weighted, total, *(tensor.grad for tensor in inputs)])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.05}
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, **tolerance)
