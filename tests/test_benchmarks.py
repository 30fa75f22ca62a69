"""The benchmark scripts run. Their figures are not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.slow


def measured(script: str, *options: str) -> dict[str, object]:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_the_cost_of_monitoring() -> None:
    pytest.importorskip("wandb")
    report = measured("monitoring.py", "--steps", "60", "--pairs", "2")
    assert isinstance(report["us_a_step"], dict)
    assert {"console", "metrics", "throughput", "wandb"} <= report["us_a_step"].keys()
    assert isinstance(report["ratio"], list)
    assert all(ratio > 0 for ratio in report["ratio"])
    assert isinstance(report["redraw_ms"], float)
    assert report["redraw_ms"] > 0


def test_the_report_of_a_long_run() -> None:
    report = measured("monitoring.py", "--report")
    assert report["logged_steps"] == 100_000
    assert isinstance(report["report_mb"], float)
    assert 0 < report["report_mb"] < 2


def test_kills_lose_nothing() -> None:
    (count,) = measured("kills.py", "--kills", "5", "--only", "1 process").values()
    assert isinstance(count, dict)
    assert (count["kills"], count["lost"], count["different"], count["refused"]) == (3, 0, 0, 0)


def test_damage_is_refused_or_harmless() -> None:
    report = measured("damage.py", "--only", "status.json", "--every", "8")
    assert (report["combinations"], report["failures"]) == (7, 0)


def test_a_day_on_a_gpu_needs_a_gpu(tmp_path: Path) -> None:
    """On another machine each part says so; the results are written all the same, and keep those of other parts."""
    script = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for part, said in (("machine", "torch sees a GPU"), ("syncs", "ended with exit code 1, see syncs.log")):
        done = subprocess.run([*script, "--only", part], capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stderr) == (1, "")
        assert said in done.stdout
    assert "torch sees no GPU" in (tmp_path / "syncs.log").read_text()
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["machine", "syncs"]
    assert "**wrong**: torch sees a GPU" in (tmp_path / "results.md").read_text()
