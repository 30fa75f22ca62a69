"""``run`` and ``train``: one job, two spellings, documented exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpt_simple
from tests.conftest import Shell
from tests.run_dir.test_layout import snapshot

PROGRAM = [sys.executable, "-c", "from gpt_simple.cli.main import main; main()"]


@pytest.mark.parametrize("arguments", [["run", "config.toml"], ["train", "--config", "config.toml"]])
def test_a_run_completes_and_leaves_its_files(shell: Shell, here: Path, arguments: list[str]) -> None:
    ended = shell(*arguments)
    assert ended.code == 0, ended.err
    names = {path.name for path in (here / "out").iterdir()}
    assert names >= {"run.json", "status.json", "summary.json", "metrics.jsonl", "tokenizer", "checkpoints"}
    files = {path.name for path in (here / "out/checkpoints/step-00000004").iterdir()}
    assert files >= {"model.safetensors", "optimizer.safetensors", "state.json", "plugins.json", "MANIFEST.json"}
    summary = json.loads((here / "out/summary.json").read_text())
    assert (summary["steps"], summary["total_tokens"]) == (4, 4 * 2 * 32)
    for word in ("validation loss", "bits per byte", "median tokens/s", "peak memory", "checkpoint", "writes", "next:"):
        assert word in ended.out


def test_overrides_in_both_forms_beat_the_file(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml", "--training.max_steps", "2", "--training.output_dir=elsewhere").code == 0
    assert json.loads((here / "elsewhere/status.json").read_text())["step"] == 2
    ran = json.loads((here / "elsewhere/run.json").read_text())["facts"]
    assert ran["config"]["training.max_steps"] == 2
    assert ran["origins"]["training.max_steps"] == "--training.max_steps"
    assert ran["origins"]["model.n_embd"] == "config.toml:2"
    assert {"python", "torch", "numpy"} <= ran["versions"].keys()
    assert {"dataset", "tokenizer"} <= ran["data"].keys()
    assert ran["plugins"]["console"].startswith("gpt-simple-trainer ")
    assert ran["run"]["device"].startswith("cpu")
    assert {"processes", "threads", "machine"} <= ran["numerics"].keys()


def test_a_finished_run_says_so_and_goes_on_when_steps_are_added(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml").code == 0
    before = (here / "out/metrics.jsonl").read_bytes()
    again = shell("run", "config.toml")
    assert again.code == 0
    assert "nothing to do" in again.out
    assert (here / "out/metrics.jsonl").read_bytes() == before
    longer = shell("run", "config.toml", "--training.max_steps", "6")
    assert longer.code == 0
    assert "changed: training.max_steps 4 -> 6" in longer.out
    assert json.loads((here / "out/summary.json").read_text())["steps"] == 6
    lineage = json.loads((here / "out/run.json").read_text())["lineage"]
    assert [(launch["step"], launch["from"]) for launch in lineage] == [(0, None), (4, "out/checkpoints/step-00000004")]


@pytest.mark.parametrize("left", [None, 0.5])
def test_a_finished_run_without_its_summary_says_so(shell: Shell, here: Path, left: float | None) -> None:
    """Deleted, or torn by a full disk."""
    assert shell("run", "config.toml").code == 0
    summary = here / "out/summary.json"
    content = summary.read_bytes()
    summary.unlink()
    if left is not None:
        summary.write_bytes(content[: int(left * len(content))])
    before = snapshot(here / "out")
    again = shell("run", "config.toml")
    assert (again.code, again.err) == (0, "")
    assert "nothing to do, step 4 of 4 was reached before" in again.out
    assert snapshot(here / "out") == before
    result = gpt_simple.train(here / "config.toml")
    best = json.loads((here / "out/checkpoints/step-00000004/state.json").read_text())["best_val_loss"]
    assert (result.status, result.steps, result.total_tokens, result.final_loss) == ("completed", 4, 4 * 64, None)
    assert (result.best_val_loss, result.checkpoint_path) == (best, Path("out/checkpoints/step-00000004"))


def test_scratch_over_checkpoints_is_refused_without_force(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml").code == 0
    (here / "out/mine.txt").write_text("keep me")
    refused = shell("run", "config.toml", "--training.resume", "scratch")
    assert refused.code == 4
    assert "--force" in refused.err
    assert (here / "out/checkpoints/step-00000004/MANIFEST.json").exists()
    forced = shell("run", "config.toml", "--training.max_steps", "2", "--force")
    assert forced.code == 0
    assert "from scratch" in forced.out
    assert [path.name for path in sorted((here / "out/checkpoints").iterdir())] == ["step-00000002"]
    assert (here / "out/mine.txt").read_text() == "keep me"


def test_force_removes_nothing_when_the_new_run_is_refused(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml").code == 0
    before = sorted(str(path) for path in (here / "out").rglob("*"))
    assert shell("run", "config.toml", "--force", "--data.source", "files", "--data.path", "missing").code == 3
    assert shell("run", "config.toml", "--force", "--model.n_head", "5").code == 2
    assert sorted(str(path) for path in (here / "out").rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--training.output_dir", "my runs", "--training.max_steps=2"),
         "gpt-simple run config.toml --training.output_dir 'my runs' --training.max_steps 4"),
        (("-p", "no:sample", "--force", "--training.max_steps", "2", "--training.resume=scratch"),
         "gpt-simple run config.toml -p no:sample --training.max_steps 4"),
    ],
)  # fmt: skip
def test_the_command_that_it_prints_goes_on_from_there(
    shell: Shell, here: Path, arguments: tuple[str, ...], wanted: str
) -> None:
    found = re.search(r"^next: (.*) goes on from here$", shell("run", "config.toml", *arguments).out, re.MULTILINE)
    assert found
    assert found[1] == wanted
    again = shell(*shlex.split(found[1])[1:])
    assert again.code == 0
    assert "resumed from step 2: " in again.out


def test_how_to_go_on_where_the_file_says_scratch(shell: Shell, here: Path) -> None:
    (here / "config.toml").write_text((here / "config.toml").read_text().replace('"out"', '"out"\nresume = "scratch"'))
    found = re.search(r"^next: (.*) goes on from here$", shell("run", "config.toml").out, re.MULTILINE)
    assert found
    assert found[1] == "gpt-simple run config.toml --training.max_steps 8 --training.resume auto"


def test_another_model_is_refused_with_the_difference(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml").code == 0
    ended = shell("run", "config.toml", "--training.max_steps", "8", "--model.n_layer", "2")
    assert ended.code == 4
    assert "model.n_layer 1 -> 2" in ended.err


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(shell: Shell, here: Path) -> None:
    """And both are named."""
    assert shell("run", "config.toml").code == 0
    damage(here / "out", 4)
    weights = here / "out/checkpoints/step-00000004/model.safetensors"
    named = shell("run", "config.toml", "--training.resume", str(weights.parent))
    assert named.code == 4
    assert f"training.resume: {weights} is damaged" in named.err
    ended = shell("run", "config.toml")
    assert ended.code == 0
    assert "step-00000004" in ended.out
    assert "resumed from step 2: bit-exact" in ended.out
    assert any("damaged" in path.name for path in (here / "out/checkpoints").iterdir())


def test_damage_stays_where_resume_names_a_path(shell: Shell, here: Path) -> None:
    """It is reported. Else the run would start from PATH again and overwrite the damaged checkpoint."""
    shell("run", "config.toml", "--training.output_dir", "first")
    branch = ["run", "config.toml", "--training.resume", "first/checkpoints/step-00000002"]
    assert shell(*branch).code == 0
    kept = {path: path.read_bytes() for path in damage(here / "out", 4)}
    refused = shell(*branch)
    assert refused.code == 4
    assert "no checkpoint in out/checkpoints can be used" in refused.err
    assert "step-00000004/model.safetensors is damaged" in refused.err
    auto = shell("run", "config.toml")
    assert (auto.code, auto.err) == (4, refused.err)
    assert {path: path.read_bytes() for path in kept} == kept

    kept = {path: path.read_bytes() for path in damage(here / "first", 4)}
    own = shell("run", "config.toml", "--training.output_dir", "first", *branch[2:])
    assert own.code == 0
    assert "step-00000004/model.safetensors is damaged" in own.out + own.err
    for path, content in kept.items():
        assert (path.parent.with_name("step-00000004.damaged") / path.name).read_bytes() == content


def test_a_checkpoint_that_was_moved_anywhere_begins_another_run(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml").code == 0
    (here / "out/checkpoints/step-00000002").rename(here / "best")
    ended = shell("run", "config.toml", "--training.output_dir", "branch", "--training.resume", "best")
    assert ended.code == 0, ended.err
    assert "resumed from step 2: bit-exact" in ended.out
    for stem in ("model", "optimizer"):
        whole, branch = (here / f"{run}/checkpoints/step-00000004/{stem}.safetensors" for run in ("out", "branch"))
        assert branch.read_bytes() == whole.read_bytes()


def damage(run: Path, step: int) -> list[Path]:
    """Flip a bit in a checkpoint; return its files."""
    directory = run / f"checkpoints/step-{step:08d}"
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return sorted(directory.iterdir())


def test_a_plugin_of_the_user_that_fails_is_named_and_exits_5(shell: Shell, here: Path) -> None:
    (here / "bad.py").write_text(
        "from gpt_simple import Plugin, hookimpl\n"
        "class Bad(Plugin):\n"
        "    on_error = 'abort'\n"
        "    @hookimpl\n"
        "    def on_step_end(self, run, event):\n"
        "        raise RuntimeError('boom')\n"
    )
    ended = shell("run", "config.toml", "-p", "./bad.py")
    assert ended.code == 5
    assert "on_step_end at step 1: RuntimeError: boom" in ended.err
    assert json.loads((here / "out/status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_exits_75_and_the_same_command_goes_on(here: Path, shell: Shell, number: signal.Signals) -> None:
    command = [*PROGRAM, "run", "config.toml", "--training.max_steps", "100000", "--training.logging_steps", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("step=3 "):
                break
        run.send_signal(number)
        rest = run.stdout.read()
        assert run.wait(60) == 75
    assert f"stopped: {number.name}" in rest
    status = json.loads((here / "out/status.json").read_text())
    assert status["state"] == "stopped"
    assert (here / f"out/checkpoints/step-{status['step']:08d}/MANIFEST.json").exists()
    ended = shell("run", "config.toml", "--training.max_steps", str(status["step"] + 1))
    assert ended.code == 0
    assert f"resumed from step {status['step']}" in ended.out


def test_a_second_ctrl_c_leaves_at_once(here: Path) -> None:
    (here / "slow.py").write_text(
        "import time\n"
        "from gpt_simple import Plugin, hookimpl\n"
        "class Slow(Plugin):\n"
        "    @hookimpl\n"
        "    def on_step_start(self, run, event):\n"
        "        if event.step == 2:\n"
        "            print('sleeping', flush=True)\n"
        "            time.sleep(60)\n"
    )
    command = [*PROGRAM, "run", "config.toml", "-p", "./slow.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "sleeping" in line:
                break
        run.send_signal(signal.SIGINT)
        time.sleep(0.6)
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130


def test_a_budget_that_one_checkpoint_uses_up_is_refused(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before --force removes anything."""
    assert shell("run", "config.toml").code == 0
    before = sorted((here / "out").rglob("*"))
    monkeypatch.setattr("gpt_simple.engine.time_budget._FIRST_GUESS_BYTES_PER_SECOND", 0.1)
    ended = shell("run", "config.toml", "--force", "--training.max_runtime_seconds", "1e6")
    assert ended.code == 2
    assert "training.max_runtime_seconds: " in ended.err
    assert sorted((here / "out").rglob("*")) == before


def test_a_time_budget_stops_the_run(shell: Shell, here: Path) -> None:
    ended = shell(
        "run",
        "config.toml",
        "--training.max_steps=1000000",
        "--training.max_runtime_seconds=6",
        "--training.walltime_reserve_seconds=3",
    )
    assert ended.code == 75
    assert "stopped: the time budget is used up" in ended.out


def test_a_pipe_gets_lines_without_escapes(shell: Shell) -> None:
    out = shell("run", "config.toml").out
    assert "\x1b" not in out
    assert "step=2 tokens=128 loss=" in out


def test_quiet_prints_nothing_but_warnings(shell: Shell) -> None:
    assert shell("run", "config.toml", "--quiet", "--training.eval_steps", "0").out == ""
