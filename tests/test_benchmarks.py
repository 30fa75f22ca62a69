"""The benchmark scripts run. Their figures are not asserted."""

from __future__ import annotations

import json
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
