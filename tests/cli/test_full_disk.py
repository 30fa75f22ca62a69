"""A disk without room: every command that writes ends with one error, and what was there stays as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gpt_simple.data import bulk
from tests.checkpoint.test_crashes import mounted, small_disk
from tests.cli.test_bad_input import snapshot
from tests.conftest import Shell
from tests.job.test_surroundings import fill

__all__ = ["small_disk"]

TINY = (
    "run",
    "config.toml",
    "--training.max_steps",
    "2",
    "--training.eval_steps",
    "null",
    "--training.save_steps=null",
)
COMMANDS = {
    "report": (2, ("report", "out", "-o", "disk/report.html")),
    "init": (2, ("init", "-o", "disk/new.toml")),
    "init over an older one": (2, ("init", "--force", "-o", "disk/old.toml")),
    "plugins new": (2, ("plugins", "new", "mine", "--directory", "disk/deep/er")),
    "tokenize": (3, ("tokenize", "--input_dir", "text", "--output_dir", "disk/data", "--tokenizer", "bytes")),
    "run": (4, (*TINY, "-p", "no:validate", "--training.output_dir", "disk/run")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_error_and_harms_nothing(shell: Shell, here: Path, small_disk: Path, command: str) -> None:
    code, arguments = COMMANDS[command]
    (here / "text").mkdir()
    (here / "text/a.txt").write_text("some words " * 30_000)
    assert shell(*TINY).code == 0
    assert shell("report", "out", "-o", "disk/report.html").code == 0
    assert shell("init", "-o", "disk/old.toml").code == 0
    fill(small_disk)
    before = snapshot(small_disk)
    ended = shell(*arguments)
    assert (ended.code, ended.err.count("error: "), "Traceback" in ended.err) == (code, 1, False), ended.err
    assert "No space left on device" in ended.err
    if command not in ("tokenize", "run"):  # they keep what is done, and an empty lock
        assert snapshot(small_disk) == before
    (small_disk / "filler").unlink()
    assert shell(*arguments).code == 0


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("room", [0, 4096, 100_000, 700_000, 1_500_000])
def test_tokenize_goes_on_when_there_is_room(
    shell: Shell, here: Path, small_disk: Path, room: int, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_simple.data.parts.UNIT_BYTES", 100_000)
    (here / "text").mkdir()
    for name in "ab":
        (here / f"text/{name}.txt").write_text(f"some words {name} " * 20_000)
    arguments = ("tokenize", "--input_dir", "text", "--tokenizer", "bytes", "--num_workers", workers, "--output_dir")
    assert shell(*arguments, "there").code == 0
    (small_disk / "room").write_bytes(b"\0" * room)
    fill(small_disk)
    (small_disk / "room").unlink()
    ended = shell(*arguments, "disk/data")
    if ended.code:
        assert (ended.code, "cannot be written" in ended.err, "Traceback" in ended.err) == (3, True, False), ended.err
        assert "the same command goes on" in ended.err
    (small_disk / "filler").unlink()
    assert shell(*arguments, "disk/data").code == 0
    assert (here / "disk/data" / bulk.FILE).read_bytes() == (here / "there" / bulk.FILE).read_bytes()


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_data_on_a_disk_that_takes_nothing_train(shell: Shell, here: Path, small_disk: Path, how: str) -> None:
    """The stamp of a comparison and the index of a packing only save time. The cache is on the same disk."""
    (here / "text").mkdir()
    for index in range(40):
        (here / f"text/{index}.txt").write_text(f"some words {index} " * 50)
    arguments = ("tokenize", "--input_dir", "text", "--tokenizer", "bytes", "--val_fraction", "0.2", "--output_dir")
    assert shell(*arguments, "disk/data").code == 0
    shutil.copytree(small_disk / "data", here / "copy")
    run = (*TINY, "--data.source=shards", "--data.tokenizer=bpe", "--data.packing=best_fit", "--data.path")
    assert shell(*run, "copy", "--training.output_dir", "whole").code == 0
    if how == "full":
        fill(small_disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    ended = subprocess.run(
        [sys.executable, "-m", "gpt_simple", *run, "disk/data"],  # a process that maps files keeps the disk busy
        env=os.environ | {"GPT_SIMPLE_CACHE": "disk/cache"},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    name = "checkpoints/step-00000002/model.safetensors"
    assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=30m,nr_inodes=60")


INODES = {
    "run": (*TINY, "--training.save_steps=1", "--data.source=null", "--data.path=text", "--data.packing=best_fit"),
    "tokenize": ("tokenize", "--input_dir=text", "--tokenizer=bytes", "--num_workers=1"),
}


@pytest.mark.parametrize("command", INODES)
def test_a_disk_without_inodes_is_one_error_until_there_are_some(
    shell: Shell, here: Path, few_inodes: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, each time with two more inodes: it ends at another file, and at last it completes."""
    (here / "text").mkdir()
    for name in "abcd":
        (here / f"text/{name}.txt").write_text(f"some words {name} " * 2000)
    option = "--output_dir" if command == "tokenize" else "--training.output_dir"
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(here / "cache"))
    assert shell(*INODES[command], option, "whole").code == 0
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(few_inodes / "cache"))
    fillers = []
    with suppress(OSError):
        while True:
            fillers.append(few_inodes / f"filler-{len(fillers)}")
            fillers[-1].touch()
    codes = []
    while not codes or codes[-1]:
        ended = shell(*INODES[command], option, "disk/out")
        codes.append(ended.code)
        assert "Traceback" not in ended.out + ended.err
        if ended.code:
            assert (ended.code in (2, 3, 4), ended.err.count("error: ")) == (True, 1), (ended.code, ended.err)
            assert "No space left on device" in ended.err
            for filler in (fillers.pop(), fillers.pop()):
                filler.unlink(missing_ok=True)
    assert len(codes) > 3
    results = ["dataset.json", "train/all/shard-00000.bin"]
    if command == "run":
        results = [f"checkpoints/step-00000002/{stem}.safetensors" for stem in ("model", "optimizer")]
    for name in results:
        assert (few_inodes / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()
