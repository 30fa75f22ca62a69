"""The prepared day on a GPU passes on one that computes nothing, before it meets a real one."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.nullgpu.device import ROOT, NullGpu

SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = list(runpy.run_path(str(SCRIPT))["PARTS"])


@pytest.mark.parametrize("part", PARTS)
def test_a_part_passes_with_tiny_sizes(part: str, gpu: NullGpu, tmp_path: Path) -> None:
    done = gpu.run([SCRIPT, "--out", tmp_path, "--tiny", "--only", part])
    log = tmp_path / f"{part}.log"
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{log.read_text()[-3000:] if log.exists() else ''}"
    assert f"## {part}" in (tmp_path / "results.md").read_text()
