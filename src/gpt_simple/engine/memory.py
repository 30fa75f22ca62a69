"""Memory: how much was used at most, and the peak arithmetic rate of known devices."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1024**3

_PEAK_FLOPS: dict[str, tuple[float | None, float, float]] = {
    "H200": (989e12, 989e12, 494e12),
    "H100 80GB HBM3": (989e12, 989e12, 494e12),
    "H100 PCIe": (756e12, 756e12, 378e12),
    **dict.fromkeys(
        ("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100-PCIE-80GB", "A100 80GB PCIe"),
        (312e12, 312e12, 156e12),
    ),
    "L40S": (362e12, 362e12, 183e12),
    "L4": (121e12, 121e12, 60e12),
    "A10G": (70e12, 70e12, 35e12),
    "Tesla V100-SXM2-16GB": (None, 125e12, 15.7e12),
    "Tesla V100-SXM2-32GB": (None, 125e12, 15.7e12),
    "Tesla V100-PCIE-16GB": (None, 112e12, 14e12),
    "Tesla V100-PCIE-32GB": (None, 112e12, 14e12),
    "Tesla T4": (None, 65e12, 8.1e12),
    "GeForce RTX 4090": (165.2e12, 165.2e12, 82.6e12),
    "GeForce RTX 3090": (71e12, 71e12, 35.6e12),
}
"""Peak FLOP/s in bf16, fp16 and "no", by the whole name of a device: similar cards and slices of one (MIG) are others.

Dense, with fp32 accumulation, from NVIDIA's data sheets (the GeForces: the Ada and GA102 white papers), most of which
print the double for sparse matrices. "no" is TF32, in which a run without mixed precision multiplies, or fp32 where
there is none (before Ampere).
"""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of ``device`` in ``precision``, or None: an unknown device has no MFU instead of a wrong one."""
    if device.type != "cuda":
        return None
    # Drivers before 470 leave the vendor out.
    known = _PEAK_FLOPS.get(torch.cuda.get_device_name(device).removeprefix("NVIDIA "))
    return None if known is None else dict(zip(("bf16", "fp16", "no"), known, strict=True))[precision]


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
