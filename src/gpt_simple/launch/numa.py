"""Processes on the cores beside their GPUs."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_NODES = Path("/sys/devices/system/node")

_log = logging.getLogger(__name__)


def numa_options(gpus: int) -> Any:
    """torch's option that binds each process to the cores beside its GPU; None where that is not possible.

    A machine with several sockets gains a few percent by it. So nothing that is missing is an error.
    """
    if gpus == 0 or len(list(_NODES.glob("node[0-9]*"))) < 2:
        return None
    if reason := _why_unbound():
        _log.debug("processes are not bound to the cores beside their GPUs: %s", reason)
        return None
    from torch.numa.binding import AffinityMode, NumaOptions

    logging.getLogger("torch.numa.binding").addFilter(_to_debug)
    return NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)


def _why_unbound() -> str:
    """Why numactl, with which torch binds, does not work here: a container may forbid its system calls."""
    if (numactl := shutil.which("numactl")) is None:
        return "numactl is not installed"
    command = [numactl, f"--physcpubind={min(os.sched_getaffinity(0))}", "true"]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=5.0, check=True)
    except subprocess.CalledProcessError as error:
        return f"numactl fails: {error.stderr.partition(os.linesep)[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"numactl fails: {error}"
    return ""


def _to_debug(record: logging.LogRecord) -> bool:
    """Reduce the two tracebacks of a process that torch cannot bind, and then starts unbound, to one line."""
    if record.exc_info:
        _log.debug("a process is not bound to the cores beside its GPU: %s", record.exc_info[1])
    return False
