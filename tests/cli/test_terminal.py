"""What a command prints neither acts on a terminal nor fails where that is not UTF-8, whatever files and names hold."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import pty
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt_simple.cli.main import main
from gpt_simple.cli.terminal import announced, shown
from tests.conftest import Shell

SOURCE = Path(__file__).parents[2] / "src" / "gpt_simple"
HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x9b31m\u202e\u00e9"
"""Sets the clipboard, rings, colours, and turns the text around; then a letter that is not ASCII."""
ACTING = ("\x1b]", "\x07", "\x9b", "\u202e")
LOGGER = f"""\
from gpt_simple import Plugin, hookimpl

class Logger(Plugin):
    @hookimpl
    def on_step_end(self, run):
        run.log.warning({HOSTILE!r})
"""

Terminal = Callable[..., tuple[int, str]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Runs a command with standard output and error on a terminal of an encoding: its exit code and what it wrote."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while chunk := os.read(master, 4096):
            seen.extend(chunk)
            if b"\0" in chunk:
                return

    reader = threading.Thread(target=read)
    reader.start()

    def run(*arguments: str, encoding: str) -> tuple[int, str]:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, open(slave, "w", encoding=encoding, closefd=False))  # noqa: SIM115
        with pytest.raises(SystemExit) as leaving:
            main(list(arguments))
        os.write(slave, b"\0")
        reader.join()
        return int(leaving.value.code or 0), seen.decode(encoding)

    yield run
    if reader.is_alive():
        os.write(slave, b"\0")
        reader.join()
    os.close(slave)
    os.close(master)


def raw(here: Path) -> None:
    (here / "raw").mkdir()
    for name in ("a", "b", "c", HOSTILE):
        (here / "raw" / f"{name}.txt").write_text(f"{HOSTILE} and {name} " * 50)
    (here / "raw" / f"{HOSTILE}.jsonl").write_text('{"body": "no such key"}\n')


def dataset(here: Path) -> None:
    raw(here)
    with pytest.raises(SystemExit):
        main(["tokenize", "--input_dir=raw", "--output_dir=data", "--tokenizer=bytes", "--val_fraction=0.5"])


def status(here: Path) -> None:
    (here / "run").mkdir()
    values = {"state": "failed", "reason": HOSTILE, "error": HOSTILE, "host": HOSTILE, "pid": 1, "time": 0.0}
    (here / "run/status.json").write_text(json.dumps(values))


def lock(here: Path) -> None:
    """One that a process of another machine holds."""
    status(here)
    owner = {"host": "other", "pid": 1, "boot": HOSTILE, "ticks": 1, "since": HOSTILE, "command": HOSTILE}
    (here / "run/.lock").write_text(json.dumps(owner))
    fcntl.flock(os.open(here / "run/.lock", os.O_RDWR), fcntl.LOCK_EX)


def trained(here: Path) -> None:
    (here / "logger.py").write_text(LOGGER)
    with pytest.raises(SystemExit):
        main(["run", "config.toml", "--training.output_dir=run", "-p", "./logger.py"])


def logger(here: Path) -> None:
    (here / "logger.py").write_text(LOGGER)


CASES: dict[str, tuple[Callable[[Path], object], list[str], int]] = {
    "status": (status, ["status", "run"], 0),
    "stop": (lock, ["stop", "run"], 0),
    "in use": (lock, ["run", "config.toml", "--training.output_dir=run"], 4),
    "tokenize": (raw, ["tokenize", "--input_dir=raw", "--output_dir", f"data{HOSTILE}", "--tokenizer=bytes"], 0),
    "tokenize --strict": (raw, ["tokenize", "--input_dir=raw", "--output_dir=data", "--strict"], 3),
    "data inspect": (dataset, ["data", "inspect", "data"], 0),
    "run, live": (logger, ["run", "config.toml", "-p", "./logger.py"], 0),
    "run, lines": (logger, ["run", "config.toml", "-p", "./logger.py", "--progress", "lines"], 0),
    "run, json": (logger, ["run", "config.toml", "-p", "./logger.py", "--progress", "json"], 0),
    "run, error": (logger, ["run", "config.toml", "--data.source=files", f"--data.path={HOSTILE}"], 3),
    "usage": (logger, ["sample", HOSTILE, HOSTILE], 2),
    "config show": (logger, ["config", "show", "config.toml", f"--training.wandb_run_name={HOSTILE}"], 0),
    "config show --json": (logger, ["config", "show", "--json", f"--training.wandb_run_name={HOSTILE}"], 0),
    "validate": (logger, ["validate", "config.toml", "--data.source=files", f"--data.path={HOSTILE}"], 3),
    "validate --json": (logger, ["validate", "config.toml", "--json", f"--training.output_dir={HOSTILE}"], 0),
    "init": (logger, ["init", "-o", f"{HOSTILE}.toml"], 0),
    "sample": (trained, ["sample", "run", "--tokens=1", "--prompt", HOSTILE], 0),
    "report": (trained, ["report", "run", "-o", f"{HOSTILE}.html"], 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_text_acts_on_a_terminal(terminal: Terminal, here: Path, case: str, encoding: str) -> None:
    prepare, arguments, code = CASES[case]
    prepare(here)
    ended, text = terminal(*arguments, encoding=encoding)
    assert ended == code, text
    assert [acting for acting in ACTING if acting in text] == []
    letter = "\u00e9" if encoding == "utf-8" and "json" not in case else ("\\xe9", "\\u00e9")["json" in case]
    assert letter in text


ANNOUNCED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "run": (logger, ["run", "config.toml"], "starting: PyTorch is loaded"),
    "validate": (logger, ["validate", "config.toml"], "checking the configuration"),
    "validate --memory": (logger, ["validate", "config.toml", "--memory"], "checking the configuration"),
    "sample": (trained, ["sample", "run", "--tokens=1"], "loading PyTorch and the model"),
    "report": (trained, ["report", "run"], "reading the metrics"),
    "plugins check": (logger, ["plugins", "check", "./logger.py"], "checking ./logger.py"),
}


@pytest.mark.parametrize("case", ANNOUNCED)
def test_a_slow_command_says_what_it_does(
    terminal: Terminal, here: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Only on a terminal."""
    prepare, arguments, line = ANNOUNCED[case]
    prepare(here)
    monkeypatch.setattr("gpt_simple.cli.terminal.SILENCE_SECONDS", 0.0)
    ended = shell(*arguments)
    assert line not in ended.out + ended.err
    assert terminal(*arguments, encoding="utf-8")[1].count(line) == 1


@pytest.mark.parametrize("more", ["--quiet", "--progress=off", "--plugins.console.progress=off", "-p no:console"])
def test_a_quiet_run_announces_nothing(
    terminal: Terminal, here: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    monkeypatch.setattr("gpt_simple.cli.terminal.SILENCE_SECONDS", 0.0)
    assert "starting" not in terminal("run", "config.toml", *more.split(), encoding="utf-8")[1]


def test_a_line_comes_after_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, not after the end, and only from the first of several processes."""
    texts: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("gpt_simple.cli.terminal.echo", lambda text, **_: texts.append(text))
    with announced("quick"):
        assert texts == []
    monkeypatch.setattr("gpt_simple.cli.terminal.SILENCE_SECONDS", 0.05)
    monkeypatch.setenv("RANK", "1")
    with announced("second"):
        time.sleep(0.1)
    monkeypatch.setenv("RANK", "0")
    with announced("slow"):
        time.sleep(0.5)
    assert texts == ["slow"]


def test_escapes_are_those_of_json_and_toml() -> None:
    assert json.loads(shown('"\\t \x7f\x9b"')) == "\t \x7f\x9b"
    assert shown("a\tb\n\u3000\u00e9") == "a\tb\n\u3000\u00e9"


def test_commands_print_in_one_way() -> None:
    """``echo`` of cli/terminal.py: ``click.echo`` and ``print`` write control characters as they are."""
    calls = [
        f"{path.name}:{node.lineno} {ast.unparse(node.func)}"
        for path in sorted((SOURCE / "cli").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo", "click.secho")
    ]
    assert [call.split()[1] for call in calls] == ["print"], calls  # that of --version
