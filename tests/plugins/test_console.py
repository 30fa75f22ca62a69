"""What is seen while a run trains: on a terminal, in a pipe, by a program."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console as Terminal

from gpt_simple.hooks import LogRecord, MetricsReady, RunStart
from gpt_simple.plugins.console import Console, ConsoleConfig
from gpt_simple.plugins.console_live import LiveView, sparkline
from gpt_simple.plugins.console_text import compiling_steps
from tests.conftest import Shell

ESCAPE = "\x1b"


@pytest.mark.parametrize("progress", [(), ("--progress", "live")])
def test_in_a_pipe_every_line_is_plain_text_that_can_be_grepped(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, progress: tuple[str, ...]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = shell("run", "config.toml", *progress).out
    assert ESCAPE not in out
    steps = [dict(pair.split("=") for pair in line.split()) for line in out.splitlines() if " loss=" in line]
    assert [int(pairs["step"]) for pairs in steps] == [2, 4]
    assert set(steps[0]) >= {"tokens", "loss", "lr", "grad_norm", "tokens_per_second", "peak_gib", "eta"}
    for word in ("device ", "parameters", "2 rows x 1 micro-batches x 1 processes x 32 tokens = 64 tokens", "plugins "):
        assert word in out


def test_the_summary_has_the_time_of_each_plugin(shell: Shell, here: Path) -> None:
    (here / "slow.py").write_text(
        "import time\nfrom gpt_simple import Plugin, hookimpl\n"
        "class Slow(Plugin):\n    @hookimpl\n    def on_run_start(self, run, event):\n        time.sleep(0.3)\n"
    )
    out = shell("run", "config.toml", "-p", "./slow.py").out
    # The line may be wrapped anywhere.
    line = re.search(r"^  time in plugins +(.*?)(?=^  \w|\Z)", out, re.MULTILINE | re.DOTALL)
    assert line is not None, out
    costs = {name: float(cost) for name, cost in re.findall(r"(\w+)\s+(\d+\.\d\d)\s+s", line[1])}
    assert {"slow", "console", "metrics", "checkpoint"} <= costs.keys()
    assert costs["slow"] >= 0.3
    assert list(costs.values()) == sorted(costs.values(), reverse=True)


def test_json_is_one_object_a_line_from_start_to_end(shell: Shell) -> None:
    rows = [
        json.loads(line) for line in shell("run", "config.toml", "--plugins.console.progress", "json").out.splitlines()
    ]
    kinds = [row["kind"] for row in rows]
    assert [kind for kind in kinds if kind != "event"] == [
        "start",
        "train",
        "checkpoint",
        "train",
        "checkpoint",
        "eval",
        "end",
    ]
    assert next(row for row in rows if row["kind"] == "train")["train/loss"] > 0
    assert rows[-1]["status"] == "completed"


def test_json_has_no_nan_and_says_what_there_was(capsys: pytest.CaptureFixture[str]) -> None:
    run: Any = SimpleNamespace(step=1, config=SimpleNamespace(training=SimpleNamespace(max_steps=2)))
    metrics = {"train/loss": 1.0, "train/grad_norm": float("inf")}
    Console(ConsoleConfig(progress="json")).on_metrics(run, MetricsReady(step=1, tokens=64, metrics=metrics))
    row = json.loads(capsys.readouterr().out)
    assert (row["train/loss"], row["train/grad_norm"]) == (1.0, None)
    assert row["nonfinite"] == {"train/grad_norm": "inf"}


def test_any_encoding_shows_all_that_a_script_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """``train()`` in a script whose standard output is strict, unlike that of the commands."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    run: Any = SimpleNamespace(step=1)
    event = LogRecord("warning", "caf\u00e9 \x1b]52;c;eA==\x07", 1, "cafe")
    Console(ConsoleConfig()).on_log(run, event)
    assert output.getvalue() == b"warning: caf\\xe9 \\ufffd]52;c;eA==\\ufffd\n"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("output", ["> /dev/full", "| head -2", ">&-"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_fails_is_reported_once_on_standard_error(here: Path, output: str, processes: int) -> None:
    """Training goes on."""
    many = f"--nproc_per_node {processes}" if processes > 1 else ""
    command = f"({sys.executable} -m gpt_simple run config.toml {many}; echo code=$? >&2) {output}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "code=0\n" in done.stderr
    assert json.loads((here / "out/summary.json").read_text())["steps"] == 4
    assert done.stderr.count("warning: standard output cannot be written") == (output != ">&-")
    assert "Exception" not in done.stderr


def test_quiet_says_nothing_but_warnings(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml", "--quiet", "--training.eval_steps", "0").out == ""
    (here / "warns.py").write_text(
        "from gpt_simple import Plugin, hookimpl\n"
        "class Warns(Plugin):\n"
        "    @hookimpl\n"
        "    def on_run_start(self, run, event):\n"
        "        run.log.info('unheard')\n"
        "        run.log.warning('heard', kind='of a plugin', lines=3)\n"
    )
    ended = shell("run", "config.toml", "--quiet", "--training.eval_steps", "0", "--force", "-p", "./warns.py")
    assert ended.out == "warning: heard\n"


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal_a_view_is_redrawn_and_the_log_stays(here: Path, colour: bool) -> None:
    output = _on_a_terminal("--training.max_steps", "40", **({} if colour else {"NO_COLOR": "1"}))
    assert f"{ESCAPE}[2K" in output, "lines are redrawn"
    assert f"{ESCAPE}[?25l" not in output, "a hidden cursor would stay hidden after a second Ctrl-C or a kill"
    assert re.search(r"step \d+/40", output)
    assert "step=4 eval_loss=" in output
    assert "completed: finished all 40 steps" in output
    assert bool(re.search(ESCAPE + r"\[[0-9;]*3[0-9;]*m", output)) == colour


def _on_a_terminal(*options: str, **variables: str) -> str:
    """What a run writes that has a terminal."""
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpt_simple", "run", "config.toml", *options]
    controller, terminal = pty.openpty()
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment | variables) as process:
        os.close(terminal)
        output = _read_to_the_end(controller)
    assert process.returncode == 0, output
    return output


def _read_to_the_end(descriptor: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # how Linux says that the other side is closed
            part = b""
        if not part:
            os.close(descriptor)
            return b"".join(parts).decode()
        parts.append(part)


def _view(best: float | None = None, **options: Any) -> LiveView:
    facts = {"floor": 1.25, "compile": "on"}
    start = RunStart(100, 1000, tokens=0, resumed_from=None, promise="", best_val_loss=best, facts=facts)
    options = {"step": lambda: 250, "left": lambda: 90.0, **options}
    return LiveView(start, terminal=Terminal(file=io.StringIO()), **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_shown_as_the_best(bad: float) -> None:
    view = _view()
    for loss in (bad, 3.0, bad, 2.0, bad):
        view.evaluation({"eval/loss": loss})
    assert "best 2.0000" in "".join(_drawn(view))


def _drawn(view: LiveView, width: int = 120) -> list[str]:
    file = io.StringIO()
    Terminal(file=file, width=width).print(view)
    return file.getvalue().splitlines()


def test_the_view_has_everything_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    view = _view(best=2.0)
    for loss in (4.0, 3.0, float("nan"), 2.5):
        view.metrics({"train/loss": loss, "train/lr": 1e-3, "perf/tokens_per_second": 12345.0, "perf/mfu": 0.414})
    view.evaluation({"eval/loss": 2.25, "eval/bits_per_byte": 1.5})
    view.checkpoint(100)
    view.warnings = 2
    progress, learning, speed, state = _drawn(view)
    assert "step 250/1,000" in progress
    assert "1m30s left" in progress
    assert "loss 2.5000 █▃ ▁   validation 2.2500   best 2.0000   bits/byte 1.5000   floor 1.2500" in learning
    assert "tokens/s 12,345   MFU 41.4%   lr 0.001" in speed
    assert state.startswith("checkpoint step 100, 0s ago   warnings 2")
    view.saving = 250
    assert "saving a checkpoint" in _drawn(view)[0]
    assert "compiling" in _drawn(_view(step=lambda: 100))[0]


def test_a_narrow_terminal_gets_whole_facts_and_no_wrapped_lines() -> None:
    view = _view()
    view.metrics({"train/loss": 2.0, "train/lr": 1e-3, "perf/tokens_per_second": 12345.0, "memory/peak_gib": 1.0})
    lines = _drawn(view, width=36)
    assert len(lines) == 3
    assert all(len(line) <= 36 for line in lines)
    assert lines[2].rstrip() == "tokens/s 12,345   lr 0.001"


def test_the_step_is_the_last_thing_that_a_narrow_terminal_loses() -> None:
    for width in range(14, 60):
        progress = _drawn(_view(), width)[0]
        assert progress.startswith("step 250/1,000")
        assert "…" not in progress


def test_sparklines_stand_between_their_own_extremes() -> None:
    assert sparkline([1.0, 2.0, 8.0]) == "▁▂█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([float("nan"), float("inf")]) == "  "


def test_the_time_left_follows_the_usual_speed() -> None:
    console = Console(ConsoleConfig(progress="lines"))
    run: Any = SimpleNamespace(step=10, config=SimpleNamespace(training=SimpleNamespace(max_steps=110)))
    assert console._left(run) is None
    # A second each, but for an interval in which something else took the machine.
    for milliseconds in (1000.0, 9000.0, 1000.0):
        metrics = {"train/loss": 1.0, "perf/step_ms": milliseconds}
        console.on_metrics(run, MetricsReady(step=10, tokens=640, metrics=metrics))
    assert console._left(run) == 100.0


def test_the_time_left_counts_the_tokens_of_the_stages() -> None:
    console = Console(ConsoleConfig(progress="lines"))
    console._stages = [
        {"first_step": 1, "tokens": 10},
        {"first_step": 5, "tokens": 40},
        {"first_step": 9, "tokens": 20},
    ]
    run: Any = SimpleNamespace(step=4, config=SimpleNamespace(training=SimpleNamespace(max_steps=10)))
    console.on_metrics(run, MetricsReady(step=4, tokens=40, metrics={"train/loss": 1.0, "perf/step_ms": 1000.0}))
    assert console._left(run) == pytest.approx(4 * 4 + 2 * 2)
    run.step = 9
    assert console._left(run) == pytest.approx(2)


def test_the_steps_that_compile_are_named() -> None:
    lengths = {1: 8, 3: 8, 5: 16, 9: 8, 11: 32}
    facts = {"compile": "model", "stages": [{"first_step": step, "length": length} for step, length in lengths.items()]}
    assert compiling_steps(facts, 0) == [1, 5, 11]
    assert compiling_steps(facts, 5) == [6, 9, 11], "a resumed process compiles anew"
    assert compiling_steps(facts, 8) == [9, 11]
    assert compiling_steps(facts, 99) == [100]
    assert compiling_steps(facts | {"compile": "off"}, 0) == []


def test_the_best_loss_outlives_a_stop_after_its_evaluation(shell: Shell, here: Path) -> None:
    """The checkpoint of the step was written before, so it does not hold that loss."""
    assert shell("run", "config.toml", "-q").code == 0
    best = json.loads((here / "out/summary.json").read_text())["best_val_loss"]
    more = ["--training.max_steps", "6", "--training.eval_steps", "0"]
    assert f"best {best:.4f}" in re.sub(ESCAPE + r"\[[0-9;]*m", "", _on_a_terminal(*more))
