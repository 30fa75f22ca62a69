"""What the command shows: the time that is left, and the files that it passes over, as `run` and `validate` do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gpt_simple.cli.tokenize import LINE_EVERY, _progress_lines
from tests.conftest import Shell


def test_the_time_left_is_never_zero(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    show = _progress_lines()
    for done in (0, 500, 999, 1000):
        show(done, 1000)
        now[0] += LINE_EVERY
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("MB/s")[2].strip() for line in lines] == ["0:00:10 left", "0:00:01 left", ""]


COMMANDS = {
    "run": ["run", "config.toml", "--data.source=files", "--data.path=corpus", "--data.val_fraction=0.5"],
    "validate": ["validate", "config.toml", "--data.source=null", "--data.path=corpus", "--data.val_fraction=0.5"],
    "tokenize": ["tokenize", "--input_dir=corpus", "--output_dir=tokens", "--tokenizer=bytes", "--val_fraction=0.5"],
}
OTHERS = ["A.TXT", "b.TXT", "sub/c.txt.gz", "sub/d.yaml", "e.toml", "f", "g.1.parquet"]


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_are_passed_over_are_counted(shell: Shell, here: Path, command: str) -> None:
    (here / "corpus/sub").mkdir(parents=True)
    for index in range(20):
        (here / f"corpus/{index}.txt").write_text(f"This is the text number {index}, which is read. " * 9)
    arguments = COMMANDS[command] + (["--training.eval_steps=0"] if command != "tokenize" else [])
    without = shell(*arguments)
    assert without.code == 0, without.err
    assert "passed over" not in without.out + without.err
    for name in OTHERS:
        (here / "corpus" / name).write_text("This is not read.")
    (here / "corpus/.hidden.TXT").touch()
    again = ["--force"] if command == "run" else []
    ended = shell(*arguments, *again)
    said = " ".join((ended.out + ended.err).split())
    assert "passed over 7 files (2 .TXT, 1 " in said
    for suffix in ("1 .txt.gz", "1 .yaml", "1 .toml", "1 without a suffix", "1 .parquet"):
        assert suffix in said
    assert "what is read ends in .txt .md .py .jsonl .jsonl.gz .jsonl.zst" in said
