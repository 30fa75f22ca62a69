"""This machine, from package metadata, environment variables and /proc: nothing is imported that takes time."""

from __future__ import annotations

import netrc
import os
import platform
import re
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, entry_points

from gpt_simple.hardware import find_compiler, gpu_driver, visible_gpus
from gpt_simple.hooks.preflight import Environment

PACKAGES = ("torch", "accelerate", "numpy", "safetensors", "tokenizers", "wandb")
BACKENDS = (
    *("inductor", "eager", "aot_eager", "aot_eager_decomp_partition", "cudagraphs", "openxla", "tvm", "onnxrt", "ts"),
    *("aot_ts", "eager_noexcept", "eager_debug", "pre_dispatch_eager", "invoke_subgraph", "openxla_eval"),
)
"""Backends of torch.compile that torch itself has registered in one version or another."""


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
