"""Memory: how much was used at most, and the peak arithmetic rate of known devices."""

from __future__ import annotations

import resource
import sys

import torch

# Dense peak in FLOP/s by a part of the device's name and the dtype, from the vendors' data sheets (without sparsity).
# Longer names first: "H100 PCIe" is another chip than "H100".
_PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("H200", {"bf16": 989e12, "fp16": 989e12, "no": 67e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp16": 756e12, "no": 51e12}),
    ("H100", {"bf16": 989e12, "fp16": 989e12, "no": 67e12}),
    ("A100", {"bf16": 312e12, "fp16": 312e12, "no": 19.5e12}),
    ("L40S", {"bf16": 362e12, "fp16": 362e12, "no": 91.6e12}),
    ("L4", {"bf16": 121e12, "fp16": 121e12, "no": 30.3e12}),
    ("A10G", {"bf16": 70e12, "fp16": 70e12, "no": 31.5e12}),
    ("V100", {"fp16": 125e12, "no": 15.7e12}),
    ("T4", {"fp16": 65e12, "no": 8.1e12}),
    ("RTX 4090", {"bf16": 165.2e12, "fp16": 165.2e12, "no": 82.6e12}),
    ("RTX 3090", {"bf16": 71e12, "fp16": 71e12, "no": 35.6e12}),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of ``device`` in ``precision``, or None: an unknown device has no MFU instead of a wrong one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, by_dtype in _PEAK_FLOPS:
        if part in name:
            return by_dtype.get(precision)
    return None


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
