"""This system, its cores and GPUs; known GPUs with their memory, their peak FLOP/s, and their names in drivers."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from attrs import field, frozen

from gpt_simple._names import PROGRAM
from gpt_simple.errors import ConfigError

_GIB = 2**30
_RESERVE = 1.5 * _GIB
"""Bytes not available to tensors: the CUDA context, cuDNN's workspaces, NCCL, and fragmentation."""

_MIB = 2**20
_SMALL, _LARGE, _AMD = int(8.125 * _MIB), 32 * _MIB, 128 * _MIB
"""Sizes of a workspace of cuBLAS (aten/src/ATen/cuda/CublasHandlePool.cpp): before Hopper, from it on, and MI300."""

_DRIVER = Path("/proc/driver/nvidia")

_DEVICES = (Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/dev/nvmap"))
"""A GPU whose driver is not in /proc has one of them: in some containers, in WSL 2, and on a Jetson."""

_UNLISTED = "NVIDIA GPU that /proc does not list"

_MEMORY = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "", ("memory.max", "memory.current", "memory.stat")),
    (Path("/sys/fs/cgroup/memory"), "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")),
)
"""Roots of the control groups of Linux, how /proc names the group, and its files: version 2 and version 1."""

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def check_system() -> None:
    """Raise ConfigError on a system without the locks, signals and process limits that a run is built on: Windows."""
    try:
        import fcntl  # noqa: F401
        import resource  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{PROGRAM} works on Linux and macOS: this system has no {error.name}", hint="on Windows, use WSL"
        ) from None


def cores() -> int:
    """The cores that this process may use: fewer than the machine has under taskset, SLURM or a container's cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_compiler(*, gpu: bool) -> tuple[str, str]:
    """The compiler that torch.compile builds generated code with: its path (empty if there is none), and its name.

    On a CPU that is a C++ compiler, on a GPU the C compiler of triton. $CXX or $CC alone counts if it is set.
    """
    names = ("gcc", "clang") if gpu else ("clang++",) if sys.platform == "darwin" else ("g++",)
    if chosen := os.environ.get("CC" if gpu else "CXX"):
        names = (chosen,)
    return next((path for name in names if (path := shutil.which(name))), ""), " or ".join(names)


def gpu_driver() -> str:
    """The version of the NVIDIA driver, empty if there is none or it is unknown."""
    found = re.search(r"Kernel Module\D*(\d[\d.]+)", read_or_empty(_DRIVER / "version"))
    return found[1] if found else ""


def visible_gpus() -> list[str]:
    """The models of the GPUs that a process sees.

    $CUDA_VISIBLE_DEVICES has numbers or names; as in the driver, the first that no GPU has ends the list.
    """
    texts = [read_or_empty(path) for path in sorted(_DRIVER.glob("gpus/*/information"))]
    listed = [(_fact(text, "Model"), _fact(text, "GPU UUID")) for text in texts]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not listed:
        hidden = visible is not None and visible.strip() in ("", "-1")
        return [_UNLISTED] if any(path.exists() for path in _DEVICES) and not hidden else []
    if visible is None:
        return [model for model, _ in listed]
    models = []
    for name in map(str.strip, visible.split(",")):
        if name.isdigit():
            found = [model for model, _ in listed][int(name) :][:1]
        else:
            is_slice = name.startswith("MIG-")
            found = ["MIG slice"] if is_slice else [m for m, uuid in listed if name and uuid.startswith(name)]
        if not found:
            break
        models += found
    return models


def _fact(text: str, name: str) -> str:
    found = re.search(rf"{name}:\s*(.+)", text)
    return found[1].strip() if found else ""


def why_no_gpu(torch_version: str, cuda: str | None) -> tuple[str, str]:
    """Why torch, which sees no GPU, cannot use one of this machine, and what to do; both empty if it has none.

    ``cuda``: the version of CUDA that torch is built for, None for a build without it.
    """
    gpus = visible_gpus()
    # WSL 2 has its device for the GPUs of any maker.
    if not gpus or (gpus == [_UNLISTED] and not _DEVICES[0].exists()):
        return "", ""
    here = f"this machine's {gpus[0]} (driver {gpu_driver() or 'unknown'})"
    if cuda is None:
        return (
            f"torch {torch_version} is built without CUDA and cannot use {here}",
            "install a build with it: https://pytorch.org/get-started/locally",
        )
    return (
        f"torch {torch_version}, built for CUDA {cuda}, cannot use {here}",
        "update the driver (CUDA 13 needs 580, CUDA 12 needs 525), or install a build for an older CUDA:"
        " https://pytorch.org/get-started/previous-versions",
    )


def read_or_empty(path: Path) -> str:
    """The text of a file, empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def free_memory() -> int | None:
    """Bytes of host memory that can still be allocated, also within the limit of a container or of a batch job.

    None if unknown. Where the system does not say what is free, all of its memory counts.
    """
    free = [int(size) * 1024 for size in re.findall(r"MemAvailable:\s*(\d+) kB", read_or_empty(_MEMORY))]
    if not free and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for root, kind, names in _CONTROL_GROUPS:
        group = re.search(rf"^\d+:{kind}:(/.*)$", read_or_empty(_OWN_GROUPS), re.MULTILINE)
        folder = root / (group[1].strip("/") if group else "")
        # Each group has a limit for all groups within it.
        for place in (folder, *folder.parents):
            limit, used, stat = (read_or_empty(place / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
                free.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return min(free, default=None)


def cublas_workspaces(capability: tuple[int, int]) -> int:
    """Bytes of torch's allocator that cuBLAS holds on a GPU of NVIDIA's with this compute capability.

    The threads of the forward and of the backward pass have a workspace each. $CUBLAS_WORKSPACE_CONFIG sets its size.
    """
    parts = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    chosen = sum(int(kib) * 1024 * int(count) for kib, count in parts)
    return 2 * (chosen or (_LARGE if capability >= (9, 0) else _SMALL))


@frozen
class GpuSpec:
    """A GPU: its memory in bytes as torch reports it, the precision that ``auto`` means, and FLOP/s by precision.

    ``workspaces``: bytes of its memory that cuBLAS holds during a run. ``free``: bytes that nobody uses, None if that
    is not known.
    ``device_names`` are its complete names in drivers, without the vendor. A similar GPU, or a slice of this one (MIG),
    has another name.
    """

    name: str
    memory: int
    precision: str
    flops: Mapping[str, float] = field(factory=dict)
    device_names: tuple[str, ...] = ()
    workspaces: int = 2 * _LARGE
    free: int | None = None

    @property
    def usable(self) -> int:
        """Bytes available to tensors."""
        room = max(0, int(self.memory - _RESERVE))
        return room if self.free is None else min(room, self.free)


def _gpu(
    name: str, gib: float, workspace: int, bf16: float | None, fp16: float, no: float, *device_names: str
) -> GpuSpec:
    flops = {"bf16": bf16, "fp16": fp16, "no": no}
    known = {precision: peak * 1e12 for precision, peak in flops.items() if peak is not None}
    return GpuSpec(name, int(gib * _GIB), "bf16" if bf16 is not None else "fp16", known, device_names, 2 * workspace)


# Memory as torch reports it, rounded down; a workspace of cuBLAS; TFLOP/s in bf16, fp16 and without mixed precision.
# These are dense, with fp32 accumulation, from the vendors' data sheets (the GeForces: the Blackwell, Ada and GA102
# white papers), most of which print the double for sparse matrices. Without mixed precision a run multiplies in TF32,
# or in fp32 before Ampere and on an AMD GPU.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 178.0, _LARGE, 2250, 2250, 1125, "B200"),
        _gpu("gb200", 184.0, _LARGE, 2500, 2500, 1250, "GB200"),
        _gpu("gh200", 94.0, _LARGE, 989, 989, 494, "GH200 480GB"),
        _gpu("h200", 139.5, _LARGE, 989, 989, 494, "H200"),
        _gpu("h200-nvl", 139.5, _LARGE, 835, 835, 417.5, "H200 NVL"),
        _gpu("h100", 79.0, _LARGE, 989, 989, 494, "H100 80GB HBM3"),
        _gpu("h100-pcie", 79.0, _LARGE, 756, 756, 378, "H100 PCIe"),
        _gpu("h100-nvl", 93.0, _LARGE, 835, 835, 417.5, "H100 NVL"),
        _gpu("a100", 79.0, _SMALL, 312, 312, 156, "A100-SXM4-80GB", "A100-PCIE-80GB", "A100 80GB PCIe"),
        _gpu("a100-40", 39.3, _SMALL, 312, 312, 156, "A100-SXM4-40GB", "A100-PCIE-40GB"),
        _gpu("l40s", 44.3, _SMALL, 362, 362, 183, "L40S"),
        _gpu("a40", 44.3, _SMALL, 149.7, 149.7, 74.8, "A40"),
        _gpu("a6000", 47.4, _SMALL, 154.8, 154.8, 77.4, "RTX A6000"),
        _gpu("l4", 22.0, _SMALL, 121, 121, 60, "L4"),
        _gpu("a10g", 22.0, _SMALL, 70, 70, 35, "A10G"),
        _gpu("rtx5090", 31.3, _LARGE, 209.5, 209.5, 104.8, "GeForce RTX 5090"),
        _gpu("rtx4090", 23.5, _SMALL, 165.2, 165.2, 82.6, "GeForce RTX 4090"),
        _gpu("rtx3090", 23.5, _SMALL, 71, 71, 35.6, "GeForce RTX 3090"),
        _gpu("v100", 31.7, _SMALL, None, 125, 15.7, "Tesla V100-SXM2-32GB"),
        _gpu("v100-16", 15.7, _SMALL, None, 125, 15.7, "Tesla V100-SXM2-16GB"),
        _gpu("v100-pcie", 31.7, _SMALL, None, 112, 14, "Tesla V100-PCIE-32GB"),
        _gpu("v100-pcie-16", 15.7, _SMALL, None, 112, 14, "Tesla V100-PCIE-16GB"),
        _gpu("t4", 14.5, _SMALL, None, 65, 8.1, "Tesla T4"),
        _gpu("mi300x", 191.5, _AMD, 1307.4, 1307.4, 163.4, "Instinct MI300X", "Instinct MI300X OAM"),
    )
}

_BY_DEVICE_NAME = {name: gpu for gpu in GPUS.values() for name in gpu.device_names}


def find_gpu(text: str) -> GpuSpec:
    """The GPU of a name, or a GPU with that much memory (``24GiB``). The ConfigError for others lists the names."""
    if (gpu := GPUS.get(text.lower().replace(" ", "").replace("_", "-"))) is not None:
        return gpu
    found = re.fullmatch(r"(\d[\d_]*\.?\d*|\.\d+)\s*([kmg]i?b)?", text.strip(), re.IGNORECASE)
    if found is not None:
        size = float(found[1].replace("_", "")) * _UNITS[(found[2] or "").lower()]
        return GpuSpec(text, int(size), "bf16")
    close = difflib.get_close_matches(text.lower(), GPUS, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(
        f"unknown{meant}",
        location=f"--device {text}",
        hint=f"expected one of {', '.join(GPUS)}, or bytes such as 24GiB",
    )


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s in ``precision`` (``bf16``, ``fp16`` or ``no``) of the device that the driver calls ``device_name``.

    None for an unknown device, which has no MFU rather than a wrong one.
    """
    # Drivers before 470 leave the vendor out.
    gpu = _BY_DEVICE_NAME.get(device_name.removeprefix("NVIDIA ").removeprefix("AMD "))
    return None if gpu is None else gpu.flops.get(precision)
