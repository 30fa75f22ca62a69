"""Signals that come when a command has done its work: they do not change its exit code."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from gpt_simple.cli import main as program
from gpt_simple.errors import CheckpointError
from gpt_simple.launch.record import Records
from gpt_simple.launch.torchrun import Launch
from tests.checkpoint.injection import outcome, start

COMMANDS = {
    "one process": (0, ["run", "config.toml", "--training.max_steps", "1", "--training.eval_steps", "null"]),
    "one process that fails": (2, ["run", "config.toml", "--training.output_dir", "config.toml"]),
    "launcher": (75, ["run", "config.toml", "--nproc_per_node", "2"]),
    "launcher that fails": (4, ["run", "config.toml", "--nproc_per_node", "2", "--training.seed", "4"]),
    "tokenize": (0, ["tokenize", "--input_dir", "text", "--output_dir", "data", "--tokenizer", "bytes"]),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_late_signal_changes_no_exit_code(
    here: Path, monkeypatch: pytest.MonkeyPatch, command: str, number: signal.Signals
) -> None:
    code, arguments = COMMANDS[command]
    (here / "text").mkdir()
    (here / "text/a.txt").write_text("some words")

    def agent(launch: Launch, words: list[str], directory: str) -> dict[int, Any]:
        """Two processes that were stopped, or failed, while their launcher gets signals."""
        records = Records(Path(directory))
        for rank in range(2):
            begun = records.begin(rank)
            assert begun is not None
            failed = CheckpointError("no room").problems if code == 4 else ()
            records.end(evolve(begun, pid=2**22 + 1, code=code, problems=failed))
        twice()
        return {}

    def twice(*_: object) -> None:
        os.kill(os.getpid(), number)
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)

    run = program._run

    def run_and_signal(*given: Any) -> int:
        ended = run(*given)
        twice()
        return ended

    monkeypatch.setattr(Launch, "_agent", agent)
    monkeypatch.setattr(program, "_run", run_and_signal)
    monkeypatch.setattr(sys, "argv", ["gpt-simple", *arguments])

    def work() -> None:
        try:
            program.main()
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))

    assert outcome(start(work)) == code


def test_main_as_a_function_restores_the_handlers(here: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        program.main(["run", "config.toml", "--training.output_dir", "config.toml"])
    assert signal.getsignal(signal.SIGTERM) == before
