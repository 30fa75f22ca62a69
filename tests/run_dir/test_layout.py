"""The directory of a run: made with care, written in one step, and cleared of nothing but the run's own files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from gpt_simple.errors import CheckpointError, ConfigError
from gpt_simple.run_dir.layout import RunDir, write_json


def snapshot(root: Path) -> dict[str, object]:
    """Every name below a directory with its content, its time and what it points to."""
    return {
        str(path.relative_to(root)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
            path.lstat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
    }


def used(root: Path) -> RunDir:
    """A directory with everything that runs leave behind."""
    run_dir = RunDir(root)
    run_dir.create()
    for path in (run_dir.run_json, run_dir.status_json, run_dir.summary_json, run_dir.metrics_jsonl):
        path.write_text("{}")
    run_dir.tokenizer.mkdir()
    (run_dir.tokenizer / "tokenizer.json").write_text("{}")
    for name in ("step-00000001", ".step-00000002.tmp-1", ".step-00000001.replaced", ".step-00000000.deleted"):
        directory = run_dir.checkpoints / name
        directory.mkdir(parents=True)
        for file in ("model.safetensors", "optimizer-00001-of-00002.safetensors", "state.json", "MANIFEST.json"):
            (directory / file).write_text("x")
    return run_dir


def test_create_makes_parents_and_can_be_repeated(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "a" / "b")
    run_dir.create()
    run_dir.create()
    assert list(run_dir.root.iterdir()) == []
    assert not run_dir.is_used()


def test_a_file_in_the_way_is_an_error_and_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "deeper" / "run"):
        with pytest.raises(ConfigError, match=r"training\.output_dir: .* cannot be written"):
            RunDir(root).create()
    assert snapshot(tmp_path).keys() == {"file"}


def test_checking_sees_a_file_in_the_way_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    RunDir(tmp_path / "a" / "b").check()
    for root in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ConfigError, match=r"training\.output_dir: .*file is a file"):
            RunDir(root).check()
    assert snapshot(tmp_path).keys() == {"file"}


def test_a_directory_that_takes_no_files_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(ConfigError, match="Read-only file system"):
        RunDir(tmp_path / "a" / "b").create()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["run.json", "metrics.jsonl", "checkpoints/step-00000010/MANIFEST.json"])
def test_any_trace_of_a_run_counts_as_used(tmp_path: Path, what: str) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".lock").touch()
    assert not RunDir(tmp_path).is_used()
    (tmp_path / what).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / what).touch()
    assert RunDir(tmp_path).is_used()


def test_force_removes_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run_dir = used(tmp_path)
    kept = [
        "notes.txt",
        ".lock",
        "wandb/run/log",
        "checkpoints/best.txt",
        "checkpoints/step-00000001/my-notes.md",
        "checkpoints/step-00000009.damaged/model.safetensors",
        "checkpoints/step-1/model.safetensors",
        "tokenizer/README.md",
    ]
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    run_dir.remove_run_files()
    assert sorted(kept) == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert not run_dir.checkpoints.joinpath(".step-00000002.tmp-1").exists()


def test_force_leaves_an_empty_directory_when_all_was_the_runs(tmp_path: Path) -> None:
    run_dir = used(tmp_path)
    run_dir.remove_run_files()
    assert list(tmp_path.iterdir()) == []
    run_dir.remove_run_files()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-00000001", "tokenizer"])
def test_force_refuses_a_link_before_it_removes_anything(tmp_path: Path, name: str) -> None:
    run_dir = used(tmp_path / "run")
    (run_dir.root / name).rename(tmp_path / "elsewhere")
    (run_dir.root / name).symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
        run_dir.remove_run_files()
    assert snapshot(tmp_path) == before


def test_force_removes_a_linked_file_but_not_what_it_points_to(tmp_path: Path) -> None:
    run_dir = used(tmp_path / "run")
    weights = run_dir.checkpoints / "step-00000001" / "model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    run_dir.remove_run_files()
    assert (tmp_path / "weights").read_text() == "x"
    assert list(run_dir.root.iterdir()) == []


def test_json_is_strict_whatever_the_numbers(tmp_path: Path) -> None:
    value = {"loss": math.nan, "best": [math.inf, 1.5], "path": Path("a/b"), 3: (1, 2)}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "loss": None,
        "best": [None, 1.5],
        "path": "a/b",
        "3": [1, 2],
    }


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_json(tmp_path / "directory", {})
    assert json.loads(path.read_text()) == {"step": 1}
    assert sorted(os.listdir(tmp_path)) == ["directory", "x.json"]
