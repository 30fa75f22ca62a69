"""No row of metrics.jsonl is lost."""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import owner_of
from tests.children import At, At2
from tests.tiny import TinyRun


def test_rows_of_metrics_wait_for_room_on_the_disk(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(FileIO):
        """Takes half of what it is given in steps 2 and 3, then nothing."""

        def write(self, data: Any) -> int:
            if full[0] == 1:
                full[0] = 2
                return super().write(bytes(data[: len(data) // 2]))
            if full[0] == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def fill(run: Any) -> None:
        full[0] = 1

    def make_room(run: Any) -> None:
        full[0] = 0

    full = [0]
    monkeypatch.setattr("gpt_simple.plugins.metrics.FileIO", Disk)
    plugins = [At("on_step_start", 2, fill), At2("on_step_start", 4, make_room)]
    result = tiny(plugins=plugins, training__logging_steps=1)
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    warned = [row["message"] for row in rows if row.get("level") == "warning"]
    assert [text.partition(": ")[2] for text in warned] == [
        "No space left on device; the rows are kept and written later"
    ]


def test_no_row_is_written_when_the_lock_is_free(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that still wait then are lost: another run may own the directory."""
    seen: list[str] = []

    class Disk(FileIO):
        def write(self, data: Any) -> int:
            seen.append(owner_of(RunDir(Path(str(self.name)).parent))[1])
            if len(seen) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr("gpt_simple.plugins.metrics.FileIO", Disk)
    assert tiny(training__logging_steps=1).status == "completed"
    assert len(seen) > 6
    assert set(seen) == {"holds"}


def test_nan_is_null_at_any_depth(tiny: TinyRun) -> None:
    nan, infinity = float("nan"), float("inf")

    def log(run: Any) -> None:
        run.log.info("scores", name="s", loss=nan, by={"a": [1.0, -infinity], "b": (nan,), "c": {"d": 2.0}}, n=[1, "x"])

    result = tiny(plugins=[At("on_step_end", 2, log)])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (result.output_dir / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    (row,) = (row for row in rows if row.get("name") == "s")
    assert (row["loss"], row["by"], row["n"]) == (None, {"a": [1.0, None], "b": [None], "c": {"d": 2.0}}, [1, "x"])
    assert row["nonfinite"] == {"loss": "nan", "by.a.1": "-inf", "by.b.0": "nan"}
