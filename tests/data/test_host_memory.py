"""Rows and checkpoints are copied also where the host gives no page-locked memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt_simple.data.host_memory import host_tensor, host_tensors


def test_ordinary_memory_where_there_is_no_page_locked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, asked = torch.empty, []

    def refuse(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ...")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(UserWarning, match=r"no page-locked host memory \(CUDA error: out of memory\): copies"):
        tensor = host_tensor((2, 3), torch.int64, pinned=True)
    assert (tuple(tensor.shape), tensor.dtype, asked) == ((2, 3), torch.int64, [True, False])


def test_it_is_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        assert host_tensor((2,), torch.float32, pinned=False).device.type == "cpu"


MIB = 2**20


def test_tensors_share_pieces_that_rounding_hardly_enlarges(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch rounds page-locked memory up to a power of two: three tables of 154 MiB would take 256 each."""
    pieces, empty = [], torch.empty

    def meta(shape: Any, **options: Any) -> torch.Tensor:
        pieces.append(shape[0])
        return empty(shape, dtype=options["dtype"])  # no page of it is touched

    monkeypatch.setattr(torch, "empty", meta)
    sizes = {f"table {index}": 154 * MIB for index in range(3)} | {f"matrix {index}": 9 * MIB for index in range(120)}
    tensors = {name: empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()}
    made = host_tensors(tensors, pinned=False)
    assert {name: tensor.nbytes for name, tensor in made.items()} == sizes
    locked = sum(1 << (size - 1).bit_length() for size in pieces)
    assert locked < 1.15 * sum(sizes.values())
    assert len(pieces) < 10


def test_tensors_in_one_piece_do_not_meet() -> None:
    like = {
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(7.0),
        "none": torch.empty(0, 4),
        "transposed": torch.arange(12.0).view(3, 4).T,
    }
    with torch.device("meta"):
        made = host_tensors(like, pinned=False)
    for name, tensor in made.items():
        assert (tensor.device.type, tensor.is_contiguous()) == ("cpu", True)
        tensor.copy_(like[name])
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in like.items())
    storages = {tensor.untyped_storage().data_ptr() for tensor in made.values() if tensor.nbytes}
    assert len(storages) == 4, "a shared storage would be copied once more when it is written"
