"""The precision that a run computes in.

The engine has its own ``torch.autocast`` and gradient scaler: Accelerate's copy outputs to fp32, and environment
variables override their configuration.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

import torch
from attrs import frozen

from gpt_simple.errors import ConfigError


@frozen
class Precision:
    """The compute precision of a run; weights and optimizer state stay fp32."""

    name: str
    why: str
    device: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    of_weights: bool = False
    """Whether the model itself has ``dtype`` in its passes, as one that is sharded over processes."""

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.dtype is None or self.of_weights:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def resolve(setting: str | None, device: torch.device) -> Precision:
    """The precision for ``setting`` (``None`` or ``auto``: by the device) on ``device``.

    Raises ConfigError for fp16 where there is no fp16 arithmetic to train with, for bf16 on GPUs before Ampere, and for
    a GPU that the installed torch has no code for.
    """
    _refuse_foreign(device)
    if setting is None or setting == "auto":
        name, why = _detect(device)
    else:
        name, why = setting, "configured"
        if name == "fp16" and device.type == "cpu":
            raise ConfigError(
                "fp16 does not train on a CPU", key="training.mixed_precision", hint='use "bf16", "no", or leave it out'
            )
        if name == "bf16" and device.type == "cuda" and not _has_bf16(device):
            capability = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
            raise ConfigError(
                f"this GPU (compute capability {capability}) only emulates bf16, which needs 8.0",
                key="training.mixed_precision",
                hint='use "fp16", "no", or leave it out',
            )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[name]
    scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
    return Precision(name, why, device, dtype, scaler)


def _refuse_foreign(device: torch.device) -> None:
    """Raise ConfigError if torch is built for other GPUs than ``device``: its first kernel would fail."""
    if device.type != "cuda" or torch.version.hip is not None:
        return
    built = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(device)
    if not built or any(_runs_on(capability, name) for name in built):
        return
    older = all(capability < found for name in built if (found := _capability(name)) is not None)
    cuda = "an older CUDA, such as cu126" if older else "another CUDA"
    raise ConfigError(
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)}, which needs"
        f" sm_{capability[0]}{capability[1]}: it is built for {', '.join(built)}",
        hint=f"install a build of torch for {cuda}: https://pytorch.org/get-started/locally",
    )


def _capability(name: str) -> tuple[int, int] | None:
    """The compute capability of machine code such as ``sm_90``; None if it is for one card alone, as ``sm_90a``."""
    found = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)", name)
    return (int(found[1]), int(found[2])) if found else None


def _runs_on(capability: tuple[int, int], name: str) -> bool:
    """Whether code called ``name`` runs on a GPU: machine code within a major version, PTX on all later ones."""
    if (built := _capability(name)) is None:
        return name == f"sm_{capability[0]}{capability[1]}a"
    return built <= capability and (name.startswith("compute_") or built[0] == capability[0])


def _detect(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "no", "auto: a CPU"
    if device.type == "cuda":
        if _has_bf16(device):
            return "bf16", "auto: Ampere or newer" if torch.version.hip is None else "auto: ROCm"
        return "fp16", "auto: a GPU older than Ampere"
    return "no", f"auto: device {device.type}"


def _has_bf16(device: torch.device) -> bool:
    # torch.cuda.is_bf16_supported() also counts emulation, which is slower than fp32.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
