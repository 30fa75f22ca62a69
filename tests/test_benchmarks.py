"""The benchmark scripts run. Their figures are not asserted."""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import time
import zipfile
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


def day(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The prepared day on a GPU, on a machine that shows none."""
    script = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out), *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(script, capture_output=True, text=True, check=False, env=env)


def test_a_day_on_a_gpu_needs_a_gpu(tmp_path: Path) -> None:
    """On another machine each part says so; the results are written all the same, and keep those of other parts."""
    for part, said in (("machine", "torch sees a GPU"), ("syncs", "ended with exit code 1")):
        done = day(tmp_path, "--only", part)
        assert (done.returncode, done.stderr) == (1, "")
        assert said in done.stdout
    assert "torch sees no GPU" in (tmp_path / "work" / "syncs.log").read_text()
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["machine", "syncs"]
    assert "**wrong**: torch sees a GPU" in (tmp_path / "results.md").read_text()


@pytest.mark.timeout(1800)
def test_several_devices_are_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    done = day(tmp_path, "--devices", "2", "--device", "cpu", "--tiny")
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, [part.get("log") for part in results.values()]
    assert list(results) == ["group", "alike", "hanging", "killed", "alone", "scaling"]
    (alike,) = results["alike"]["lines"]
    assert float(alike["largest_gap"]) <= 1e-4
    assert [(line["processes"], line["checkpointing"]) for line in results["scaling"]["lines"]] == [
        (1, False), (2, False), (1, True), (2, True),
    ]  # fmt: skip


def test_a_part_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    done = day(tmp_path, "--budget", "1", "--from", "oom")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "left out, for lack of time: oom, sigterm (go on with --from oom)\n"
    assert "It was left out, for lack of time." in (tmp_path / "results.md").read_text()


def test_cases_without_time_are_counted(tmp_path: Path) -> None:
    script = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    part = script["Part"]("syncs", tmp_path, script["TINY"], deadline=time.monotonic() + 0.1)
    done = [case for case in part.in_time(range(5)) if not time.sleep(0.07)]
    assert done == [0]
    assert part.lines == [{"left_out": "4 more, for lack of time"}]


def test_missing_packages_are_named_and_found_in_wheels(tmp_path: Path) -> None:
    """A package in front of the installed one cannot be imported; the wheel is in front of that."""
    broken = tmp_path / "broken" / "annotated_types"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken')")
    done = day(tmp_path, "--only", "machine", PYTHONPATH=str(broken.parent))
    assert (done.returncode, done.stdout) == (2, "")
    assert "  annotated-types>=0.7: broken\n" in done.stderr
    assert "-d FOLDER 'annotated-types>=0.7'\n" in done.stderr
    assert "Traceback" not in done.stderr
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "annotated_types-1-py3-none-any.whl", "w") as wheel:
        for file in importlib.metadata.files("annotated-types") or ():
            wheel.write(file.locate(), str(file))
    done = day(tmp_path, "--only", "machine", "--wheels", str(wheels), PYTHONPATH=str(broken.parent))
    assert (done.returncode, done.stderr) == (1, "")
    assert "torch sees a GPU" in done.stdout
