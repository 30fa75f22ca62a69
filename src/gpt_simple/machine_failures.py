"""Failures of the machine, which are the defect of no code: used-up memory, and a device that no longer works.

torch reports most of them with types of its own. This module never imports torch: without it there are none of these.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gpt_simple.errors import DeviceLost, GptSimpleError, OutOfMemory

_GIB = 2**30

_NO_MEMORY = 2
"""The number of CUDA's error for memory, of the device or page-locked, that cannot be allocated."""

_LOST = (46, 214, 220, *range(700, 722), 999)
"""The numbers of CUDA's and HIP's errors after which every call fails until the process ends: sticky ones."""

_NO_MEMORY_TEXTS = ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED")
"""torch raises a plain RuntimeError for these two."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the host could not be allocated."""
    return not isinstance(error, GptSimpleError) and any(map(_says_no_memory, _chain(error)))


def is_device_lost(error: BaseException) -> bool:
    """Whether the device fails in every call from now on, as after an illegal access or an Xid."""
    torch: Any = sys.modules.get("torch")
    if torch is None or isinstance(error, GptSimpleError) or not isinstance(error, RuntimeError):
        return False
    if is_out_of_memory(error):
        return False
    for cause in _chain(error):
        if isinstance(cause, _accelerator_error(torch)):
            return getattr(cause, "error_code", None) in (None, *_LOST)
    # Libraries such as cuBLAS and triton have other errors. A call that waits for nothing says what the device is like.
    try:
        if torch.cuda.is_initialized():
            torch.cuda.mem_get_info()
    except _accelerator_error(torch) as answer:
        return is_device_lost(answer)
    return False


def is_of_machine(error: BaseException) -> bool:
    """Whether ``error`` is one of the failures that are the defect of no code."""
    return is_out_of_memory(error) or is_device_lost(error)


@contextmanager
def explained_machine_failures(hint: Callable[[bool], str] | str = "") -> Iterator[None]:
    """Raise OutOfMemory or DeviceLost for a failure of the machine within; both are still torch's types, too.

    ``hint``: what to do about memory. A function gets whether it is the memory of a device.
    """
    try:
        yield
    except GptSimpleError:
        raise
    except Exception as error:
        if (explained := explain(error, hint)) is None:
            raise
        raise explained from error


def explain(error: Exception, hint: Callable[[bool], str] | str = "") -> GptSimpleError | None:
    """The error to show for a failure of the machine; None for any other."""
    torch: Any = sys.modules.get("torch")
    if is_out_of_memory(error):
        cause = next(filter(_says_no_memory, _chain(error)))
        on_device = _is_of_device(cause)
        where, numbers = _memory(torch) if on_device else ("the host", "")
        message = f"{where} is out of memory{numbers} ({_short(cause)})"
        advice = hint if isinstance(hint, str) else hint(on_device)
        _release(error)
        kind: Any = OutOfMemory if isinstance(cause, MemoryError) else _typed(OutOfMemory, torch.OutOfMemoryError)
        return kind(message, hint=advice)  # type: ignore[no-any-return]
    if is_device_lost(error):
        # A tensor that is freed now may make torch abort the process: from now on no garbage is looked for.
        gc.freeze()
        message = f"{_device(torch)} is lost: every call fails from now on ({_short(error)})"
        advice = "the driver's log says why (dmesg, nvidia-smi); start again on a device that works"
        return _typed(DeviceLost, _accelerator_error(torch))(message, hint=advice)  # type: ignore[no-any-return]
    return None


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or _is_of_device(error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY_TEXTS)


def _is_of_device(error: BaseException) -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY_TEXTS[1] in str(error):
        return True
    return isinstance(error, _accelerator_error(torch)) and getattr(error, "error_code", None) == _NO_MEMORY


def _accelerator_error(torch: Any) -> type[Exception]:
    found: type[Exception] = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised for, also inside the errors of torch's compiler."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        following = following.__cause__ or getattr(following, "inner_exception", None)


def _memory(torch: Any) -> tuple[str, str]:
    """The device, and the numbers of its memory that torch has."""
    with suppress(RuntimeError, AssertionError):
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            sizes = [f"{size / _GIB:.2f} GiB" for size in (allocated, reserved, free, total)]
            numbers = f": tensors take {sizes[0]} of the {sizes[1]} that torch holds, {sizes[2]} of {sizes[3]} are free"
            return _device(torch), numbers
    return _device(torch), ""


def _device(torch: Any) -> str:
    """``cuda:0 (NVIDIA H200)``."""
    with suppress(RuntimeError, AssertionError):
        if torch.cuda.is_initialized():
            device = torch.cuda.current_device()
            return f"cuda:{device} ({torch.cuda.get_device_name(device)})"
    return "the device"


def _typed(kind: type[GptSimpleError], of_torch: type[Exception]) -> Any:
    """``kind`` as a type of torch's, too: programs catch that one around ``train``."""
    return type(kind.__name__, (kind, of_torch), {})


def _short(error: BaseException) -> str:
    """The library's message without the lines and sentences that repeat numbers or advise."""
    text = ". ".join(str(error).partition("\n")[0].split(". ")[:2])
    return text.rstrip(".")[:200] or type(error).__name__


def _release(error: BaseException) -> None:
    """Let go of the tensors in the frames that the error has left: what follows needs the memory."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)
