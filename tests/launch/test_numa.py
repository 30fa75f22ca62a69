"""Processes are bound to the cores beside their GPUs where that is possible. Fakes stand for the GPU and numactl."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.numa.binding

from gpt_simple.hardware import cores
from gpt_simple.launch import numa
from gpt_simple.launch.torchrun import Launch

COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
REFUSED = "This system does not support NUMA policy"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A GPU, two sockets, and a numactl that writes its option into ``bound``."""
    for number in (0, 1):
        (tmp_path / f"nodes/node{number}").mkdir(parents=True)
    monkeypatch.setattr(numa, "_NODES", tmp_path / "nodes")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xFE, pci_device_id=0x1F)  # which no machine has
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: place)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    (tmp_path / "numa_node").write_text("0")
    monkeypatch.setattr(torch.numa.binding, "open", partial(open_beside, tmp_path), raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    numactl(tmp_path, f'echo "$1" >> {tmp_path}/bound; shift; exec "$@"')
    for name in (COMPILERS, "OMP_NUM_THREADS"):  # the launcher sets them, here for later tests
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    caplog.set_level(logging.DEBUG, "gpt_simple")
    return tmp_path


def open_beside(folder: Path, path: str) -> Any:
    """``open`` of torch, for which the GPU's own file is in ``folder``."""
    return open(folder / "numa_node" if path.endswith("fe:1f.0/numa_node") else path)


def numactl(folder: Path, script: str) -> None:
    (folder / "numactl").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "numactl").chmod(0o755)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Level and text of what was logged, without the agent's events."""
    return [(record.levelno, record.getMessage()) for record in caplog.records if "events" not in record.name]


def launched(folder: Path, processes: int = 1) -> bool:
    """Whether the processes of a launch ran, with their share of the cores for compilers."""
    script = f"import os; open({str(folder)!r} + '/ran' + os.environ['RANK'], 'w').write(os.environ[{COMPILERS!r}])"
    Launch(str(processes)).run([sys.executable, "-c", script])
    share = max(1, min(32, cores() // processes))
    return [int(path.read_text()) for path in folder.glob("ran*")] == [share] * processes


def test_a_process_is_bound_to_the_cores_of_its_gpu(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert launched(machine)
    probe, process = (machine / "bound").read_text().split()
    assert probe.startswith("--physcpubind=")
    assert process == f"--physcpubind={','.join(_ranges(sorted(os.sched_getaffinity(0))))}"
    assert said(caplog) == []


def _ranges(cores: list[int]) -> list[str]:
    starts = [core for core in cores if core - 1 not in cores]
    ends = [core for core in cores if core + 1 not in cores]
    return [str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("missing", ["numactl", "its system calls", "the device in sysfs"])
def test_what_is_missing_costs_one_line_for_debugging(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    if missing == "numactl":
        (machine / "numactl").unlink()
        expected = "numactl is not installed"
    elif missing == "its system calls":
        numactl(machine, f"echo {REFUSED} >&2; exit 1")
        expected = REFUSED
    else:
        (machine / "numa_node").unlink()
        expected = "numa_node"
    assert launched(machine)
    ((level, text),) = said(caplog)
    assert level == logging.DEBUG
    assert "not bound to the cores beside" in text
    assert expected in text


@pytest.mark.parametrize("why", ["no GPU", "one socket"])
def test_nothing_is_bound_where_nothing_is_gained(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    if why == "no GPU":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    else:
        (machine / "nodes/node1").rmdir()
    assert launched(machine, processes=1 if why == "one socket" else 2)
    assert not (machine / "bound").exists()
    assert said(caplog) == []
