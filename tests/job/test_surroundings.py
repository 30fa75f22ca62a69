"""What happens around a run: a disk that is really full, a clock that is set, another run that is faster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import hookimpl
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.lineage import read_metrics
from tests.checkpoint.injection import FINISHED, outcome, start
from tests.checkpoint.test_crashes import small_disk
from tests.children import At, At2, Ended, Everywhere
from tests.tiny import TinyRun, state_bytes

__all__ = ["small_disk"]


def fill(disk: Path) -> None:
    """Leave no byte free. The file's name fits: a directory may have to grow for it."""
    descriptor = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
    with suppress(OSError):
        while True:
            os.write(descriptor, b"\0" * 512)
    os.close(descriptor)


def test_a_disk_that_is_full_for_a_while_costs_no_step_or_row(tiny: TinyRun, small_disk: Path) -> None:
    options: dict[str, Any] = {"training__max_steps": 12, "training__save_steps": 2, "training__logging_steps": 1}
    whole = tiny("whole", **options)
    result = tiny(
        "disk/run",
        plugins=[
            At("on_step_end", 3, lambda run: fill(small_disk)),
            At2("on_step_end", 9, lambda run: (small_disk / "filler").unlink()),
        ],
        **options,
    )
    assert result.status == "completed"
    rows = read_metrics(result.output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in rows if row.get("name") == "checkpoint"] == [2, 9, 10, 12]
    assert [row["step"] for row in rows if row.get("name") == "checkpoint_failed"] == [4]
    assert state_bytes(result) == state_bytes(whole)


def test_a_disk_that_stays_full_fails_the_run_and_keeps_saves(
    apart: Callable[..., Ended], tiny: TinyRun, small_disk: Path
) -> None:
    options: dict[str, Any] = {"training__save_steps": 2, "training__logging_steps": 1}
    ended = apart("disk/run", plugins=[At("on_step_end", 3, lambda run: fill(small_disk))], **options)
    assert (ended.code, ended.status.state, ended.steps) == (4, "failed", [2])
    assert "No space left on device; it needs 0.5 MiB and 0.0 MiB are free" in str(ended.status.error)
    before = sorted((small_disk / "run").rglob("*"))
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"are free|No space left"):
            tiny("disk/run", force=force, **options)
        assert sorted((small_disk / "run").rglob("*")) == before
    (small_disk / "filler").unlink()
    assert tiny("disk/run", **options).status == "completed"


def test_a_clock_that_jumps_a_day_changes_nothing(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "training__save_steps": 2,
        "training__keep_last_k": 1,
        "training__max_runtime_seconds": 3600.0,
        "model__dropout": 0.1,
        "optimizer__schedule": "constant",  # the others depend on max_steps
    }
    whole = tiny("whole", training__max_steps=12, **options)
    now, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])

    def jump(days: float) -> Callable[[Any], None]:
        return lambda run: shift.__setitem__(0, 86_400 * days)

    for steps, days in ((4, -1), (8, 2), (12, -3)):
        plugins = [At("on_step_start", steps - 1, jump(days)), At2("on_step_start", steps, jump(-days))]
        result = tiny("parts", plugins=plugins, training__max_steps=steps, **options)
        assert (result.status, result.steps) == ("completed", steps)
    assert sorted(path.name for path in (result.output_dir / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000012",
    ]
    assert state_bytes(result) == state_bytes(whole)


def test_a_launch_that_another_overtook_changes_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    """Both looked and found nothing; the other one was done before this one claimed the directory."""

    class Overtaken(Everywhere):
        @hookimpl
        def check_runtime(self, run: Any) -> list[Any]:
            assert outcome(start(tiny)) == FINISHED
            files.update({path: path.read_bytes() for path in (tmp_path / "run/checkpoints").rglob("*.*")})
            return []

    files: dict[Path, bytes] = {}
    with pytest.raises(CheckpointError, match=r"another run has written to .* just now: start again"):
        tiny(plugins=[Overtaken()])
    assert files
    assert {path: path.read_bytes() for path in files} == files
    assert tiny(training__max_steps=8).steps == 8
