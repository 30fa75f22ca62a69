"""This machine, from package metadata, environment variables and /proc: nothing is imported that takes time."""

from __future__ import annotations

import netrc
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from attrs import frozen

PACKAGES = ("torch", "accelerate", "numpy", "safetensors", "tokenizers", "wandb")
_DRIVER = Path("/proc/driver/nvidia")


@frozen
class Environment:
    """``gpus`` are the models that the NVIDIA driver lists; ``broken`` a sentence for each plugin that cannot be used.

    ``compiler`` is the path of a C++ compiler or empty, ``seconds_left`` what SLURM still grants or None, and
    ``wandb_key`` whether one is at hand (never the key).
    """

    python: str
    packages: Mapping[str, str]
    driver: str
    gpus: Sequence[str]
    compiler: str
    broken: Sequence[str]
    wandb_key: bool
    wandb_offline: bool
    seconds_left: float | None

    @property
    def torch_has_cuda(self) -> bool:
        """Whether the installed torch was built for CUDA, by its version's local part (``+cpu``)."""
        return not self.packages.get("torch", "").endswith("+cpu")


def look(broken: Sequence[str]) -> Environment:
    """Look around; a fact that the system does not tell is empty. ``broken`` is passed on."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return Environment(
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        driver=_driver(),
        gpus=_gpus(),
        compiler=next((path for name in compilers if name and (path := shutil.which(name))), ""),
        broken=broken,
        wandb_key=bool(os.environ.get("WANDB_API_KEY")) or _netrc_knows("api.wandb.ai"),
        wandb_offline=os.environ.get("WANDB_MODE") in ("offline", "disabled"),
        seconds_left=_seconds_left(),
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
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return []
    texts = [_read(path) for path in sorted(_DRIVER.glob("gpus/*/information"))]
    return [found[1].strip() for text in texts if (found := re.search(r"Model:\s*(.+)", text))]


def _netrc_knows(host: str) -> bool:
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


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
