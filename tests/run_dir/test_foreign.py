"""What no run wrote stays as it is: a launch that would change it, or follow a link, is refused and names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir, write_json
from gpt_simple.run_dir.lock import RunLock
from gpt_simple.run_dir.status import StatusFile
from tests.run_dir.test_layout import snapshot
from tests.tiny import TinyRun, weights

FILES = (
    ".lock",
    ".stop",
    "run.json",
    "status.json",
    "summary.json",
    "metrics.jsonl",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)
DIRECTORIES = ("tokenizer", "checkpoints", "checkpoints/step-00000001")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", [*FILES, "checkpoints/step-00000001/model.safetensors"])
def test_a_file_that_no_run_wrote_is_refused(tiny: TinyRun, tmp_path: Path, name: str, force: bool) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    before = snapshot(tmp_path)
    named = path.parent if path.suffix == ".safetensors" else path
    with pytest.raises(CheckpointError, match=rf"{named} is there already, and no run wrote it; move it away"):
        tiny(force=force)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", [*FILES, *DIRECTORIES])
@pytest.mark.parametrize("target", ["file", "directory", "nowhere"])
@pytest.mark.parametrize("force", [False, True])
def test_a_link_in_a_run_directory_is_refused(tmp_path: Path, name: str, target: str, force: bool) -> None:
    root = tmp_path / "run"
    write_json_in(root)
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "directory").mkdir()
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(tmp_path / target)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=f"{root / name} is a symbolic link"):
        RunDir(root).remove_run_files() if force else RunDir(root).check()
    assert snapshot(tmp_path) == before


def write_json_in(root: Path) -> None:
    root.mkdir()
    write_json(root / "run.json", {"run_id": "abcdefgh"})
    write_json(root / "status.json", {"state": "completed"})


@pytest.mark.parametrize("name", FILES[:6])
def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    write_json_in(tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"{path} is not a file"):
        RunDir(tmp_path / "run").check()


@pytest.mark.parametrize("name", DIRECTORIES[:2])
def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    write_json_in(tmp_path / "run")
    (tmp_path / "run" / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} is not a directory"):
        RunDir(tmp_path / "run").check()


def test_no_writer_follows_a_link(tmp_path: Path) -> None:
    """Even one that appears after the check."""
    run_dir, victim = RunDir(tmp_path / "run"), tmp_path / "victim"
    run_dir.create()
    victim.write_text("theirs" * 1000)
    run_dir.lock.symlink_to(victim)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        RunLock(run_dir).acquire()
    for path in (run_dir.run_json, run_dir.status_json, run_dir.stop_request):
        path.symlink_to(victim)
        write_json(path, {})
    run_dir.status_json.unlink()
    run_dir.status_json.symlink_to(victim)
    StatusFile(run_dir).update(state="failed", force=True)
    assert victim.read_text() == "theirs" * 1000


@pytest.mark.parametrize("left", ["run.json", "status.json", ".lock", "checkpoints/step-00000006/MANIFEST.json"])
def test_any_sign_of_a_run_makes_its_files_its_own(tiny: TinyRun, left: str) -> None:
    root = tiny().output_dir
    for name in {"run.json", "status.json", ".lock"} - {left}:
        (root / name).unlink()
    if "/" not in left:
        (root / "checkpoints/step-00000006/MANIFEST.json").unlink()
    RunDir(root).check()


def test_foreign_files_among_those_of_a_run_stay(tiny: TinyRun) -> None:
    root = tiny().output_dir
    mine = [root / "tokenizer/tokenizer_config.json", root / "report.html", root / "checkpoints/notes.json"]
    for path in mine:
        path.write_text(json.dumps("mine"))
    again = tiny(force=True)
    assert [path.read_text() for path in mine] == [json.dumps("mine")] * 3
    assert weights(again)
