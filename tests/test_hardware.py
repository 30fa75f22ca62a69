"""The system, its cores, and the peak arithmetic of known GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_simple import hardware
from gpt_simple.hardware import cores, cublas_workspaces, peak_flops
from gpt_simple.plugin_host.discovery import own_commands

_WINDOWS = """
import os, signal, sys
sys.modules |= {"fcntl": None, "resource": None, "pwd": None, "grp": None, "termios": None}
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "pthread_sigmask"):
    delattr(signal, name)
del os.sched_getaffinity
"""
_LINE = "gpt-simple works on Linux and macOS: this system has no fcntl; on Windows, use WSL"


def on_windows(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WINDOWS + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_on_windows_every_command_says_that_it_does_not_work() -> None:
    code = "from gpt_simple.cli.main import main\nfor name in sys.argv[1:]:\n"
    code += "    try: main([name, '--help'])\n    except SystemExit as end: print(end.code)\nmain()"
    ended = on_windows(code, *own_commands())
    assert ended.stderr.splitlines() == [f"error: {_LINE}"] * (len(own_commands()) + 1)
    assert ended.stdout.split() == ["2"] * len(own_commands())
    assert ended.returncode == 2


def test_on_windows_train_says_that_it_does_not_work() -> None:
    ended = on_windows("import gpt_simple\ntry: gpt_simple.train()\nexcept gpt_simple.ConfigError as e: print(e)")
    assert (ended.stdout, ended.stderr) == (_LINE + "\n", "")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_only_cores_of_the_process_are_counted() -> None:
    source = Path(__file__).parents[1] / "src"
    counting = [path.name for path in source.rglob("*.py") if "cpu_count" in path.read_text()]
    assert counting == ["hardware.py"]
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("name", "bf16", "without"),
    [
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA GB200", 2500e12, 1250e12),
        ("NVIDIA GH200 480GB", 989e12, 494e12),
        ("NVIDIA H100 NVL", 835e12, 417.5e12),
        ("NVIDIA H200 NVL", 835e12, 417.5e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12),
        ("NVIDIA RTX A6000", 154.8e12, 77.4e12),
        ("NVIDIA A40", 149.7e12, 74.8e12),
        ("AMD Instinct MI300X", 1307.4e12, 163.4e12),
        ("NVIDIA H200", 989e12, 494e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("A100-PCIE-40GB", 312e12, 156e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("GeForce RTX 3090", 71e12, 35.6e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("Tesla T4", None, 8.1e12),
    ],
)
def test_peaks_are_dense_and_tf32_without_mixed_precision(name: str, bf16: float | None, without: float) -> None:
    assert (peak_flops(name, "bf16"), peak_flops(name, "no")) == (bf16, without)
    assert peak_flops("cpu (2 threads)", "no") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100 NVL MIG 1g.12gb",
        "NVIDIA GH200 144G HBM3e",
        "NVIDIA RTX A6000 Laptop GPU",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA A40-48Q",
        "AMD Instinct MI300A",
        "NVIDIA A100X",
        "NVIDIA L40",
        "NVIDIA L4-24Q",
        "NVIDIA A10",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA T400 4GB",
        "Quadro T4000",
        "Tesla V100S-PCIE-32GB",
    ],
)
def test_a_device_with_a_similar_name_has_no_peak(name: str) -> None:
    assert [peak_flops(name, precision) for precision in ("bf16", "fp16", "no")] == [None] * 3


def test_workspaces_of_cublas_grow_with_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    mib = [cublas_workspaces(capability) / 2**20 for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert mib == [16.25, 16.25, 16.25, 64, 64, 64]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert cublas_workspaces((9, 0)) == 2 * (2 * 4096 + 8 * 16) * 1024


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_or_a_job_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, names = {1: ("memory", ("limit_in_bytes", "usage_in_bytes")), 2: ("", ("max", "current"))}[version]
    groups, job = tmp_path / "cgroup", tmp_path / "cgroup" / "slurm" / "job_1"
    job.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "self").write_text(f"3:cpuset:/\n{2 if kind else 0}:{kind}:/slurm/job_1\n")
    monkeypatch.setattr(hardware, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "_OWN_GROUPS", tmp_path / "self")
    found = [(groups, kind, (f"memory.{names[0]}", f"memory.{names[1]}", "memory.stat"))]
    monkeypatch.setattr(hardware, "_CONTROL_GROUPS", found)
    assert hardware.free_memory() == 8000 * 1024
    for folder, limit, used, cached in ((job.parent, 7000, 2000, 500), (job, 6000, 3000, 1000)):
        (folder / f"memory.{names[0]}").write_text(f"{limit * 1024}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used * 1024}\n")
        (folder / "memory.stat").write_text(f"anon 1\ntotal_inactive_file {cached * 1024}\n")
        assert hardware.free_memory() == (limit - used + cached) * 1024
