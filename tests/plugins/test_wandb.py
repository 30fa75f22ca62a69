"""W&B: real offline runs, read back with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Config, ConfigError, Plugin, PluginError, TrainingConfig, hookimpl, read_metrics, redacted
from gpt_simple.config.schema import PluginsConfig
from gpt_simple.hooks import LogRecord, StepEnd
from gpt_simple.testing import check_contract
from tests.children import stops_at
from tests.conftest import Shell
from tests.plugins.offline import files, read, sent
from tests.tiny import TinyRun

wandb = pytest.importorskip("wandb")

OFFLINE = {"training__wandb_project": "stories", "plugins__wandb__mode": "offline"}


class Says(Plugin[Any]):
    """Keeps the log of the run."""

    def __init__(self) -> None:
        super().__init__(None)
        self.records: list[LogRecord] = []

    @hookimpl
    def on_log(self, run: Any, event: LogRecord) -> None:
        self.records.append(event)


def test_a_run_reports_metrics_over_its_own_steps(tiny: TinyRun) -> None:
    result = tiny(**OFFLINE, training__eval_steps=3)
    (launch,) = sent(result.output_dir)
    trained = [row for row in launch.rows if "train/loss" in row]
    assert [row["step"] for row in trained] == [2, 4, 6]
    assert trained[-1]["train/loss"] == pytest.approx(result.final_loss)
    assert trained[-1]["tokens"] == result.total_tokens
    assert [row["step"] for row in launch.rows if "eval/loss" in row] == [3, 6]
    assert {"glob_name": "*", "options": {"defined": True, "step_sync": True}, "step_metric": "step"} in launch.metrics
    assert launch.summary["best_val_loss"] == pytest.approx(result.best_val_loss)
    assert launch.config["training"]["max_steps"] == 6
    assert launch.config["facts"]["parameters"] > 0
    assert launch.exit_code == 0


def test_one_run_across_a_stop_a_crash_and_a_lost_run_json(tiny: TinyRun) -> None:
    result = tiny(**OFFLINE, training__max_steps=2)
    tiny(**OFFLINE, training__max_steps=8, training__save_steps=4, plugins=[stops_at(4)])
    crashed = "the test crashes"

    class Crashes(Plugin[Any]):
        on_error = "abort"

        @hookimpl
        def on_step_end(self, run: Any, event: StepEnd) -> None:
            if event.step == 7:
                raise ConfigError(crashed)

    with pytest.raises(PluginError, match=crashed):
        tiny(**OFFLINE, training__max_steps=8, plugins=[Crashes])
    run_json = result.output_dir / "run.json"
    run_id = json.loads(run_json.read_text())["run_id"]
    run_json.unlink()
    tiny(**OFFLINE, training__max_steps=8)
    launches = sent(result.output_dir)
    assert {launch.id for launch in launches} == {run_id}
    assert [launch.exit_code for launch in launches] == [0, 0, 1, 0]
    assert [[row["step"] for row in launch.rows] for launch in launches] == [[2], [4], [6], [6, 8]]
    merged = {row["step"]: row["train/loss"] for launch in launches for row in launch.rows}
    kept = {
        row["step"]: row["train/loss"]
        for row in read_metrics(result.output_dir / "metrics.jsonl")
        if "train/loss" in row
    }
    assert merged == pytest.approx(kept)


def test_the_id_before_a_checkpoint_is_that_of_the_directory(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(PluginError):
        tiny(**OFFLINE, plugins=[_fails_at_once()])
    tiny(**OFFLINE)
    first, second = sent(tmp_path / "run")
    assert first.id == second.id == json.loads((tmp_path / "run/run.json").read_text())["run_id"]


def _fails_at_once() -> type[Plugin[Any]]:
    class Fails(Plugin[Any]):
        on_error = "abort"

        @hookimpl
        def on_step_end(self, run: Any, event: StepEnd) -> None:
            raise ConfigError("the test fails")

    return Fails


def test_force_and_a_branch_are_new_runs(tiny: TinyRun, tmp_path: Path) -> None:
    first = tiny(**OFFLINE, training__max_steps=2)
    tiny(**OFFLINE, training__max_steps=2, force=True)
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    tiny("branch", **OFFLINE, training__max_steps=4, training__resume=str(checkpoint))
    tiny("branch", **OFFLINE, training__max_steps=6)
    before, forced = (launch.id for launch in sent(first.output_dir))
    branch, branch_again = (launch.id for launch in sent(tmp_path / "branch"))
    assert len({before, forced, branch}) == 3
    assert branch_again == branch


def test_without_a_key_it_goes_offline_and_logs_that_once(tiny: TinyRun) -> None:
    says = Says()
    result = tiny(training__wandb_project="stories", plugins=[says])
    assert len(sent(result.output_dir)) == 1
    (line,) = [record.message for record in says.records if record.name == "wandb"]
    assert "no API key" in line
    assert f"gpt-simple wandb upload {result.output_dir}" in line


def test_without_a_network_training_goes_on_with_one_warning(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.plugins.wandb._INIT_SECONDS", 0.5)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    says = Says()
    result = tiny(training__wandb_project="stories", plugins=[says])
    assert (result.status, result.steps) == ("completed", 6)
    (warning,) = [record for record in says.records if record.level == "warning"]
    assert warning.message.startswith("W&B does not work")
    assert "gpt-simple wandb upload" in warning.message
    wandb.teardown()


def test_data_that_could_not_be_sent_at_the_end_are_reported(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class LostItsNetwork:
        offline = disabled = False
        url = "https://wandb.example/run"
        summary: dict[str, Any] = {}

        def log(self, row: dict[str, Any]) -> None: ...

        def finish(self, exit_code: int) -> None:
            raise TimeoutError("not everything was sent")

    monkeypatch.setattr("gpt_simple.plugins.wandb.open_run", lambda *_, **__: LostItsNetwork())
    says = Says()
    result = tiny(training__wandb_project="p", plugins=[says])
    assert result.status == "completed"
    assert any(record.message == "W&B: https://wandb.example/run" for record in says.records)
    (warning,) = [record.message for record in says.records if record.level == "warning"]
    assert "not everything was sent" in warning
    run_id = json.loads((result.output_dir / "run.json").read_text())["run_id"]
    assert f"gpt-simple wandb upload {result.output_dir} --id {run_id}-upload" in warning, "W&B has a part of the run"


KILLS = """
import os, signal
from pathlib import Path

from gpt_simple import Plugin, hookimpl


class Kills(Plugin):
    after = ("wandb",)  # in on_close the order is the other way round

    @hookimpl
    def {hook}(self, run, event):
        if getattr(event, "step", 3) == 3:
            own = [path for path in Path("/proc").glob("[0-9]*/stat") if parent(path) == os.getpid()]
            (core,) = [path for path in own if "wandb-core" in (path.parent / "cmdline").read_text()]
            os.kill(int(core.parent.name), signal.SIGKILL)
            print("killed", flush=True)


def parent(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
"""


@pytest.mark.parametrize("hook", ["on_step_end", pytest.param("on_close", marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds W&B's process in /proc")
def test_a_killed_service_costs_one_warning_and_keeps_the_id(here: Path, shell: Shell, hook: str) -> None:
    """In a process of its own, for the service is shared by all runs of a process."""
    (here / "kills.py").write_text(KILLS.format(hook=hook))
    program = [sys.executable, "-m", "gpt_simple", "run", "config.toml", "--training.logging_steps", "1"]
    options = ["--training.wandb_project", "p", "--plugins.wandb.mode", "offline"]
    done = subprocess.run([*program, *options, "-p", "./kills.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("killed\n"), done.stdout.count("W&B does not work")) == (1, 1)
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads((here / "out/summary.json").read_text())["steps"] == 4
    again = shell("run", "config.toml", *options, "--training.logging_steps", "1", "--training.max_steps", "6")
    assert again.code == 0, again.err
    *_, resumed = files(here / "out")  # of the killed one perhaps not even a file had reached the disk
    assert read(resumed).id == json.loads((here / "out/run.json").read_text())["run_id"]
    assert [row["step"] for row in read(resumed).rows if "train/loss" in row] == [5, 6]


def test_a_mode_of_the_environment_is_shown_or_refused(
    here: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    refused = shell("run", "config.toml", "--training.wandb_project", "p")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "WANDB_MODE: expected online, offline or disabled, got 'nonsense'" in refused.err
    monkeypatch.setenv("WANDB_MODE", "disabled")
    ended = shell("run", "config.toml", "--training.wandb_project", "p")
    assert "W&B is disabled by WANDB_MODE=disabled: later `gpt-simple wandb upload out` sends the run" in ended.out
    assert "None" not in ended.out
    assert not (here / "out/wandb").exists()


@pytest.mark.parametrize("project", ["a/b", ""])
def test_a_name_that_no_project_can_have_is_refused(shell: Shell, here: Path, project: str) -> None:
    ended = shell("run", "config.toml", "--training.wandb_project", project)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "training.wandb_project" in ended.err
    assert not (here / "out").exists()


@pytest.mark.parametrize("tags", ['[""]', f'["good", "{65 * "x"}"]'])
def test_a_tag_that_no_run_can_have_is_refused(shell: Shell, here: Path, tags: str) -> None:
    ended = shell("run", "config.toml", "--training.wandb_project", "p", "--plugins.wandb.tags", tags)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--plugins.wandb.tags" in ended.err
    assert "Tags must be between 1 and 64 characters" in ended.err
    assert not (here / "out").exists()


def test_a_missing_package_is_one_line_with_the_command(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    (here / "wandb").mkdir()  # W&B's own files in the current directory are not the package
    monkeypatch.setattr("gpt_simple.plugins.wandb.find_spec", lambda name: None)
    ended = shell("run", "config.toml", "--training.wandb_project", "p")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "training.wandb_project" in ended.err
    assert "pip install" in ended.err
    assert not (here / "out").exists()


def test_the_process_is_left_as_it_was_found(tiny: TinyRun) -> None:
    before = sys.exit, sys.excepthook, wandb.run
    tiny(**OFFLINE)
    assert (sys.exit, sys.excepthook, wandb.run) == before


def test_keeps_the_contract_of_plugins() -> None:
    wandb.setup()  # its threads are the package's and outlive every run
    overrides = {"training.wandb_project": "p", "plugins.wandb.mode": "offline"}
    from gpt_simple.plugins.wandb import Wandb

    check_contract(Wandb, overrides=overrides, enable=("wandb",))


def test_secrets_stay_here() -> None:
    tables = {
        "notify": {"webhook_url": "https://x/T0/B0", "url": "https://me:pw@host/x", "max_new_tokens": 3},
        "store": {"api_key": "k", "auth": {"user": "me"}, "tokenizer": "bpe", "keys": ["a"], "hf_token": ""},
    }
    shared = redacted(Config(training=TrainingConfig(wandb_project="p"), plugins=PluginsConfig(tables=tables)))
    assert shared["plugins"]["notify"] == {
        "webhook_url": "(redacted)",
        "url": "https://(redacted)@host/x",
        "max_new_tokens": 3,
    }
    assert shared["plugins"]["store"] == {
        "api_key": "(redacted)",
        "auth": {"user": "(redacted)"},
        "tokenizer": "bpe",
        "keys": ["a"],
        "hf_token": "",
    }
    assert shared["training"]["wandb_project"] == "p"
    assert shared["data"]["text_key"] == "text"
    assert shared["data"]["tokenizer"] == "bpe"
