"""Documents that share a row do not see each other, by every kernel for it, and none is lost in a block mask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from gpt_simple.model import documents, gpt
from gpt_simple.model.documents import block_mask, dense_mask, document_kernel
from gpt_simple.model.gpt import GPT

from .conftest import LENGTH, SHAPES, rows, tiny

LENGTHS = ((7, 1, LENGTH - 8), (LENGTH - 3, 2, 1))
"""Documents of the two rows."""


@pytest.fixture
def flex_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention on a CPU. Torch refuses its gradient there, though the formula behind its kernels runs."""
    torch._dynamo.reset()
    documents._generated.cache_clear()
    monkeypatch.setattr(gpt, "document_kernel", torch.compiler.assume_constant_result(lambda *_: "flex"))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(documents, "_generated", lambda: documents._attend)
    yield
    torch._dynamo.reset()


def packed(length: int = LENGTH, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> dict[str, Tensor]:
    ids, labels = rows(len(lengths), length)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    numbers = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "document_ids": numbers}


def logits_alone(model: GPT, ids: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.cat([model(document)[0] for document in row.unsqueeze(0).split(lengths, dim=1)])
            for row, lengths in zip(ids, LENGTHS, strict=True)
        ]
    )


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flex_attention_separates_packed_documents(shape: dict[str, Any], flex_here: None) -> None:
    model, arguments = tiny(**shape), packed()
    del arguments["labels"]
    expected = logits_alone(model, arguments["input_ids"])
    torch.testing.assert_close(model(**arguments), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scope", "shape"), [("model", "gqa"), ("blocks", "default")])
def test_compiled_flex_attention_has_the_dense_mask_gradients(
    scope: str, shape: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    batches = packed(), packed(lengths=LENGTHS[::-1])
    model = tiny(**SHAPES[shape]).train()
    expected = [gradients(model, model(**batch)) for batch in batches]
    request.getfixturevalue("flex_here")
    model.set_activation_checkpointing(1)
    forward: Any = model
    if scope == "model":
        forward = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for batch, theirs in zip(batches, expected, strict=True):
        for ours, wanted in zip(gradients(model, forward(**batch)), theirs, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [100, 128, 300, 1024])
def test_the_block_mask_equals_the_one_made_by_torch(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    starts = torch.rand(4, length, generator=generator) < torch.tensor([0.0, 0.004, 0.02, 1.0])[:, None]
    ids = starts.long().cumsum(1)
    elements = dense_mask(ids)

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return elements[row, 0, query, key]

    theirs = torch_flex.create_block_mask(rule, 4, None, length, length, device="cpu")
    ours = block_mask(ids)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.sparsity() == theirs.sparsity()
    index = torch.arange(length)
    for row in range(4):
        assert torch.equal(ours.mask_mod(row, 0, index[:, None], index), elements[row, 0])  # type: ignore[arg-type]


def test_full_blocks_are_full_and_ids_may_come_in_any_order() -> None:
    ids = torch.randint(0, 3, (2, 512), generator=torch.Generator().manual_seed(0))
    ids[1, :300] = 7
    ours, elements = block_mask(ids), dense_mask(ids).view(2, 4, 128, 4, 128).transpose(2, 3)
    assert bool((ours.to_dense()[:, 0].bool() | ~elements.any(-1).any(-1)).all())
    for row, query in ((1, 0), (1, 1), (1, 2), (0, 3)):
        count = int(ours.full_kv_num_blocks[row, 0, query])  # type: ignore[index]
        for key in ours.full_kv_indices[row, 0, query, :count]:  # type: ignore[index]
            assert bool(elements[row, query, key].all())
    assert ours.full_kv_num_blocks[1, 0].tolist() == [0, 1, 0, 0]  # type: ignore[index]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """An H100 of which only the capability is asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(documents, "find_spec", lambda name: True)
    monkeypatch.setattr("shutil.which", lambda name: name)
    documents._best_kernel.cache_clear()
    yield torch.device("cuda", 0)
    documents._best_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("head", [8, 16, 64, 128, 192, 256])
def test_flex_attention_is_chosen_where_its_tiles_fit(
    dtype: torch.dtype, capability: tuple[int, int], head: int, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fits = dtype.itemsize == 2 and capability >= (8, 0) and 16 <= head <= 128
    assert document_kernel(gpu, dtype, head, 0.0) == ("flex" if fits else "dense mask")
    assert document_kernel(gpu, dtype, head, 0.1) == "dense mask"


def test_a_cpu_and_a_gpu_without_triton_take_the_dense_mask(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert document_kernel(torch.device("cpu"), torch.bfloat16, 64, 0.0) == "dense mask"
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    assert document_kernel(gpu, torch.bfloat16, 64, 0.0) == "dense mask"


def test_the_choice_of_a_kernel_is_a_constant_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(documents, "find_spec", lambda name: True)  # and it looks for a compiler on the PATH
    device = torch.device("cuda", 1)

    def chosen(x: Tensor) -> Tensor:
        return x + 1 if document_kernel(device, torch.bfloat16, 64, 0.0) == "flex" else x

    torch._dynamo.reset()
    documents._best_kernel.cache_clear()
    torch._dynamo.utils.warn_once_cache.clear()
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a cache that Dynamo ignores
        assert torch.equal(compiled(torch.zeros(1)), chosen(torch.zeros(1)))
    documents._best_kernel.cache_clear()


def test_autocast_decides_the_type_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(gpt, "document_kernel", lambda device, dtype, *_: asked.append(dtype) or "dense mask")
    model, cpu = tiny(), torch.device("cpu")
    model.document_kernel(cpu)
    with torch.autocast("cpu", torch.bfloat16):
        model.document_kernel(cpu)
    assert asked == [torch.float32, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_kernel_equals_the_dense_mask(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = tiny(n_embd=64, n_kv_head=2).train().cuda()
    batch = {name: tensor.cuda() for name, tensor in packed().items()}
    bf16 = torch.autocast("cuda", torch.bfloat16)
    with bf16:
        assert model.document_kernel(batch["input_ids"].device) == "flex"
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    with bf16:
        loss = forward(**batch)
    actual = gradients(model, loss)
    torch._dynamo.reset()
    monkeypatch.setattr(gpt, "document_kernel", lambda *_: "dense mask")
    with bf16:
        loss = model(**batch)
    for ours, theirs in zip(actual, gradients(model, loss), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
