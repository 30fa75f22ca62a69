"""The model under the compiler: whole graphs, the same numbers, attention left as one kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from gpt_simple.model.gpt import GPT

from .conftest import LENGTH, SHAPES, needs_compiler, rows, tiny


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(document_mask: bool) -> dict[str, Tensor]:
    ids, labels = rows()
    arguments = {"input_ids": ids, "labels": labels}
    if document_mask:
        arguments["position_ids"] = torch.arange(LENGTH).remainder(10).expand(2, -1)
        arguments["document_ids"] = torch.arange(LENGTH).div(10, rounding_mode="floor").expand(2, -1)
    return arguments


def gradients(model: GPT, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("shape", "scope", "checkpointing", "document_mask"),
    [
        ("default", "model", 0, False),
        ("gpt2", "model", 1, True),
        ("gqa", "model", 1, False),
        ("default", "blocks", 1, True),
        ("gpt2", "blocks", 0, False),
        ("mqa-ntk", "blocks", 1, False),
    ],
)
def test_one_graph_and_the_same_gradients(shape: str, scope: str, checkpointing: int, document_mask: bool) -> None:
    arguments = batch(document_mask)
    model = tiny(**SHAPES[shape]).train()
    expected = gradients(model, model(**arguments))
    model.set_activation_checkpointing(checkpointing)
    forward = model
    if scope == "model":
        forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=scope == "model"):
        actual = gradients(model, forward(**arguments))
        gradients(model, forward(**arguments))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.compiler
@needs_compiler
def test_attention_stays_one_kernel_in_generated_code() -> None:
    model = tiny().train()
    x, rotation = model._embed(rows()[0], None)

    @torch.compile(fullgraph=True)
    def recomputed(x: Tensor) -> Tensor:
        attention = model.blocks[0].attention
        attended: Tensor = checkpoint(attention, x, rotation, None, use_reentrant=False)
        return attended

    # With the caches on, a graph that was compiled before brings no source.
    with torch._inductor.config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        _, sources = run_and_get_code(lambda: recomputed(x).sum().backward())
    calls = [re.findall(r"^ *buf\d+ = torch\.ops\..*flash_attention.*", code, re.MULTILINE) for code in sources]
    assert [len(found) for found in calls] == [1, 2]  # the forward; recomputed, and its gradient
    assert "bmm" not in "".join(sources)
