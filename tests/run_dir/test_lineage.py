"""What ran, from which checkpoint it went on, and which rows of its log count."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord, new_id, read_metrics


def test_the_id_is_made_once_and_every_launch_is_kept(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    first = RunRecord.load(run_dir)
    assert not run_dir.run_json.exists()
    first.launched({"config": {"seed": 1}}, step=0, resumed_from=None)
    second = RunRecord.load(run_dir)
    second.launched({"config": {"seed": 2}}, step=500, resumed_from=tmp_path / "step-00000500")
    document = json.loads(run_dir.run_json.read_text())
    assert document["run_id"] == first.run_id == second.run_id
    assert document["facts"] == {"config": {"seed": 2}}
    assert [(launch["step"], launch["from"]) for launch in document["lineage"]] == [
        (0, None),
        (500, str(tmp_path / "step-00000500")),
    ]
    assert {launch["pid"] for launch in document["lineage"]} == {os.getpid()}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "x"}'])
def test_a_damaged_record_is_named_with_a_way_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged .*move it away"):
        RunRecord.load(RunDir(tmp_path))


def test_ids_are_short_plain_and_differ() -> None:
    ids = {new_id() for _ in range(200)}
    assert len(ids) == 200
    assert all(re.fullmatch(r"[a-z0-9]{8}", one) for one in ids)


def test_the_last_row_of_a_kind_and_step_counts(tmp_path: Path) -> None:
    rows = [
        {"kind": "train", "step": 10, "train/loss": 3.0},
        {"kind": "train", "step": 20, "train/loss": 2.0},
        {"kind": "eval", "step": 20, "eval/loss": 2.1},
        {"kind": "event", "step": 20, "name": "saved"},
        {"kind": "event", "step": 20, "name": "skipped"},
        {"kind": "event", "step": 20, "name": "told", "message": "eval abandoned"},
        {"kind": "train", "step": 30, "train/loss": 9.0},
        {"kind": "train", "step": 20, "train/loss": 2.5},
        {"kind": "train", "step": 30, "train/loss": None, "nonfinite": {"train/loss": "nan"}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_metrics(path)
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
    assert [row for row in found if row["kind"] == "train"] == [rows[0], rows[7], rows[8]]
    assert [row["name"] for row in found if row["kind"] == "event"] == ["saved", "skipped", "told"]
    assert rows[2] in found
    assert read_metrics(path, "eval") == [rows[2]]


def test_repeated_steps_keep_each_event_once(tmp_path: Path) -> None:
    def event(name: str, message: str, **more: Any) -> dict[str, Any]:
        return {"kind": "event", "step": 5, "name": name, "message": message, **more}

    rows = [
        event("sample", "Once", index=0),
        event("sample", "Twice", index=1),
        event("", "beware"),
        event("", "take care"),
    ]
    again = [event("sample", "Another", index=0), event("sample", "text", index=1), event("", "beware")]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    assert [row["message"] for row in read_metrics(path)] == ["take care", "Another", "text", "beware"]


@pytest.mark.parametrize(
    "torn",
    [b'{"kind": "train", "st', b"\xff\xfe", b"7", b"[]", b'{"kind": "train"}', b'{"kind": [], "step": 1}', b"\n\n"],
)
def test_torn_lines_are_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"kind": "train", "step": step}).encode() for step in (1, 2)]
    path.write_bytes(good[0] + b"\n" + torn + b"\n" + good[1] + b"\n" + torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
