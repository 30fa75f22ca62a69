"""Used-up memory and a lost device: recognised by what torch raises, and explained with its numbers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpt_simple.errors import ConfigError, DeviceLost, GptSimpleError, OutOfMemory
from gpt_simple.machine_failures import explain, explained_machine_failures, is_device_lost, is_out_of_memory

GIB = 2**30
OUT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
)


@pytest.fixture(autouse=True)
def garbage_is_collected_again() -> Iterator[None]:
    yield
    gc.unfreeze()


def numbered(code: int | None, text: str = "CUDA error: unspecified launch failure\nmore") -> torch.AcceleratorError:
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


def caused(cause: BaseException, *, inner: bool = False) -> RuntimeError:
    error = RuntimeError("the backend compiler failed")
    if inner:
        error.inner_exception = cause  # type: ignore[attr-defined]
    else:
        error.__cause__ = cause
    return error


def full_host() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    return caught.value


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    answers: dict[str, Any] = {
        "is_initialized": True,
        "current_device": 1,
        "get_device_name": "NVIDIA H200",
        "memory_allocated": 6 * GIB,
        "memory_reserved": 7 * GIB,
        "mem_get_info": (GIB // 2, 8 * GIB),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return monkeypatch


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(OUT),
        numbered(2, "CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        full_host(),
        caused(torch.OutOfMemoryError(OUT)),
        caused(torch.OutOfMemoryError(OUT), inner=True),
    ],
    ids=["host", "device", "pinned", "cublas", "host tensor", "cause", "compiler"],
)
def test_used_up_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_device_lost(error)
    explained = explain(error, "buy more")
    assert isinstance(explained, OutOfMemory)
    assert explained.exit_code == 1
    assert str(explained).endswith("; buy more")


@pytest.mark.parametrize("error", [numbered(None), numbered(700), numbered(719), numbered(999), caused(numbered(719))])
def test_a_lost_device_is_recognised(error: Exception, gpu: Any) -> None:
    assert is_device_lost(error)
    match = r"^cuda:1 \(NVIDIA H200\) is lost: every call fails"
    with pytest.raises(DeviceLost, match=match) as caught, explained_machine_failures():
        raise error
    assert caught.value.exit_code == 1
    assert isinstance(caught.value, torch.AcceleratorError)
    assert gc.get_freeze_count() > 0  # torch may abort where a tensor on a lost device is freed


@pytest.mark.parametrize("error", [numbered(101), RuntimeError("shapes differ"), ValueError("no"), ConfigError("no")])
def test_other_errors_stay_as_they_are(error: Exception, gpu: Any) -> None:
    assert explain(error) is None
    with pytest.raises(type(error)) as caught, explained_machine_failures():
        raise error
    assert caught.value is error


def test_the_error_of_a_library_is_checked_against_the_device(gpu: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise numbered(700, "CUDA error: an illegal memory access was encountered")

    error = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")
    assert not is_device_lost(error)
    gpu.setattr(torch.cuda, "mem_get_info", refuse)
    assert is_device_lost(error)


def test_the_message_has_the_numbers_of_torch(gpu: Any) -> None:
    explained = explain(torch.OutOfMemoryError(OUT), "buy more")
    assert isinstance(explained, torch.OutOfMemoryError)  # programs catch that around train
    assert str(explained) == (
        "cuda:1 (NVIDIA H200) is out of memory: tensors take 6.00 GiB of the 7.00 GiB that torch holds, 0.50 GiB of"
        " 8.00 GiB are free (CUDA out of memory. Tried to allocate 2.00 GiB); buy more"
    )


def test_the_advice_distinguishes_the_device_and_the_host() -> None:
    def advice(on_device: bool) -> str:
        return "device" if on_device else "host"

    for error, expected in ((torch.OutOfMemoryError(OUT), "device"), (MemoryError(), "host"), (full_host(), "host")):
        explained = explain(error, advice)
        assert explained is not None
        assert explained.problems[0].hint == expected


def test_the_frames_of_used_up_memory_let_go_of_tensors() -> None:
    class Held:
        gone = False

        def __del__(self) -> None:
            Held.gone = True

    def fill() -> None:
        held = Held()
        raise torch.OutOfMemoryError(f"{OUT}{held.gone}")

    with pytest.raises(OutOfMemory), explained_machine_failures():
        fill()
    assert Held.gone


def test_without_torch_there_is_only_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    assert isinstance(explain(MemoryError()), GptSimpleError)
    assert explain(RuntimeError("CUDA out of memory")) is None
