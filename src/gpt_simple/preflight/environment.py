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

from gpt_simple.hardware import find_compiler, gpu_driver, read_or_empty, visible_gpus
from gpt_simple.hooks.preflight import Environment

PACKAGES = ("torch", "accelerate", "numpy", "safetensors", "tokenizers", "wandb")
BACKENDS = (
    *("inductor", "eager", "aot_eager", "aot_eager_decomp_partition", "cudagraphs", "openxla", "tvm", "onnxrt", "ts"),
    *("aot_ts", "eager_noexcept", "eager_debug", "pre_dispatch_eager", "invoke_subgraph", "openxla_eval"),
)
"""Backends of torch.compile that torch itself has registered in one version or another."""

_MEMORY = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "", ("memory.max", "memory.current", "memory.stat")),
    (Path("/sys/fs/cgroup/memory"), "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")),
)
"""Roots of the control groups of Linux, how /proc names the group, and its files: version 2 and version 1."""


def check_environment(broken: Sequence[str]) -> Environment:
    """What the system provides; an unknown fact is empty. ``broken`` is passed on."""
    gpus = visible_gpus()
    compiler, searched = find_compiler(gpu=bool(gpus))
    return Environment(
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        driver=gpu_driver(),
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
