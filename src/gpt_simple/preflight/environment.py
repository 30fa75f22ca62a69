"""This machine, from package metadata, environment variables and /proc: nothing is imported that takes time."""

from __future__ import annotations

import netrc
import os
import platform
import re
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

from gpt_simple.hardware import find_compiler
from gpt_simple.hooks.preflight import Environment

PACKAGES = ("torch", "accelerate", "numpy", "safetensors", "tokenizers", "wandb")
BACKENDS = (
    *("inductor", "eager", "aot_eager", "aot_eager_decomp_partition", "cudagraphs", "openxla", "tvm", "onnxrt", "ts"),
    *("aot_ts", "eager_noexcept", "eager_debug", "pre_dispatch_eager", "invoke_subgraph", "openxla_eval"),
)
"""Backends of torch.compile that torch itself has registered in one version or another."""

_DRIVER, _CONTROL_GROUP = Path("/proc/driver/nvidia"), Path("/sys/fs/cgroup")

_DEVICES = (Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/dev/nvmap"))
"""A GPU whose driver is not in /proc has one of them: in some containers, in WSL 2, and on a Jetson."""

_UNLISTED = "NVIDIA GPU that /proc does not list"


def check_environment(broken: Sequence[str]) -> Environment:
    """What the system provides; an unknown fact is empty. ``broken`` is passed on."""
    gpus = _gpus()
    compiler, searched = find_compiler(gpu=bool(gpus))
    return Environment(
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        driver=_driver(),
        gpus=gpus,
        compiler=compiler,
        missing_compiler="" if compiler else searched,
        broken=broken,
        wandb_key=bool(os.environ.get("WANDB_API_KEY")) or _has_netrc_entry("api.wandb.ai"),
        wandb_offline=os.environ.get("WANDB_MODE") in ("offline", "disabled"),
        seconds_left=_seconds_left(),
        backends=(*BACKENDS, *sorted({entry.name for entry in entry_points(group="torch_dynamo_backends")})),
    )


def _version(name: str) -> str:
    """The installed version. `importlib.metadata.version` takes 2 ms for each, because it parses the README as well."""
    try:
        text = distribution(name).read_text("METADATA") or ""
    except PackageNotFoundError:
        return ""
    found = re.search(r"^Version: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _driver() -> str:
    found = re.search(r"Kernel Module\D*(\d[\d.]+)", _read(_DRIVER / "version"))
    return found[1] if found else ""


def _gpus() -> list[str]:
    """The models of the GPUs that a process sees.

    $CUDA_VISIBLE_DEVICES has numbers or names; as in the driver, the first that no GPU has ends the list.
    """
    texts = [_read(path) for path in sorted(_DRIVER.glob("gpus/*/information"))]
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


def _has_netrc_entry(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _seconds_left() -> float | None:
    """Until the end of the SLURM job that this shell belongs to."""
    try:
        return float(os.environ["SLURM_JOB_END_TIME"]) - time.time()
    except (KeyError, ValueError):
        return None


def free_memory() -> int | None:
    """Bytes of host memory that can still be allocated, also within a container's limit; None if unknown."""
    free = [int(size) * 1024 for size in re.findall(r"MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")))]
    limit, used = (_read(_CONTROL_GROUP / f"memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return min(free, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
