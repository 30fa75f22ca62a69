"""Commands that get the directory of a run: it is a configuration too, and without a run the runs below are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gpt_simple
from tests.conftest import Shell
from tests.run_dir.test_layout import snapshot

PLUGIN = """\
from attrs import frozen
from gpt_simple import Plugin

@frozen
class Config:
    api_key: str = ""
    every: int = 1

class Extra(Plugin[Config]):
    Config = Config
"""


def stopped(shell: Shell, *arguments: str) -> None:
    """A run that ends before its last step."""
    short = ["--training.max_steps=2", "--optimizer.decay_steps=3", "--training.output_dir=runs/a"]
    assert shell("run", "config.toml", *short, *arguments).code == 0


def test_a_run_directory_goes_on_with_its_own_values(shell: Shell, here: Path) -> None:
    stopped(shell, "-p", "memory", "-p", "no:sample", "--training.resume=scratch", "--data.max_documents=150")
    (here / "config.toml").unlink()
    (here / "runs/a").rename(here / "moved")
    ended = shell("run", "moved", "--training.max_steps", "4")
    assert ended.code == 0, ended.err
    assert "resumed from step 2" in ended.out
    assert "resumed from step 2: changed: training.max_steps 2 -> 4\n" in ended.out
    facts = json.loads((here / "moved/run.json").read_text())["facts"]
    assert facts["config"]["data.max_documents"] == 150
    assert {"memory", "sample"} & facts["plugins"].keys() == {"memory"}
    assert facts["origins"]["training.max_steps"] == "--training.max_steps"
    assert facts["origins"]["data.max_documents"] == "moved/run.json"
    assert "model.dropout" not in facts["origins"]
    again = shell("run", "moved")
    assert again.code == 0
    assert "nothing to do" in again.out
    result = gpt_simple.train("moved", overrides={"training.max_steps": 5})
    assert result.checkpoint_path.name == "step-00000005"


def test_a_run_directory_is_a_configuration_for_all(shell: Shell, here: Path) -> None:
    stopped(shell)
    for command in (["validate"], ["config", "show"], ["config", "schema", "-c"], ["plugins", "list", "-c"]):
        ended = shell(*command, "runs/a")
        assert ended.code == 0, ended.err + ended.out
    assert "decay_steps = 3" in shell("config", "show", "runs/a", "--origin").out


def test_a_secret_of_the_run_has_to_be_given_again(shell: Shell, here: Path) -> None:
    (here / "extra.py").write_text(PLUGIN)
    stopped(shell, "-p", "./extra.py", "--plugins.extra.api_key=sekret9", "--plugins.extra.every=7")
    ended = shell("config", "show", "runs/a", "-p", "./extra.py")
    assert "every = 7" in ended.out
    assert "plugins.extra.api_key is a secret, which runs/a/run.json does not hold: give it again" in ended.err
    without = shell("run", "runs/a")
    assert without.code == 2
    assert "no plugin 'extra' is installed" in without.err


COMMANDS = {
    "status": (["status", "runs"], 4),
    "stop": (["stop", "runs"], 4),
    "report": (["report", "runs"], 4),
    "sample": (["sample", "runs"], 4),
    "wandb upload": (["wandb", "upload", "runs"], 4),
    "run": (["run", "runs"], 2),
    "validate": (["validate", "runs"], 2),
    "show": (["config", "show", "runs"], 2),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_runs_below_a_directory_are_named(shell: Shell, here: Path, command: str) -> None:
    for name in ("runs/b", "runs/sweep/a", "runs/too/deep/for/this", "runs/.hidden"):
        (here / name).mkdir(parents=True)
        (here / name / "run.json").write_text("{}")
    before = snapshot(here)
    arguments, code = COMMANDS[command]
    ended = shell(*arguments)
    assert ended.code == code
    said = " ".join((ended.out + ended.err).split())
    assert "there is no run in" in said
    assert "the runs below it are runs/b, runs/sweep/a" in said
    assert "deep" not in said
    assert "hidden" not in said
    assert snapshot(here) == before


@pytest.mark.parametrize(
    "command",
    [["data", "inspect", "sets"], ["run", "--data.format=pretokenized", "--data.path=sets"]],
    ids=lambda command: command[0],
)
def test_the_data_sets_below_a_directory_are_named(shell: Shell, here: Path, command: list[str]) -> None:
    for name in ("sets/b", "sets/more/a", "sets/too/deep/for/this", "sets/.hidden"):
        (here / name).mkdir(parents=True)
        (here / name / "dataset.json").write_text("{}")
    ended = shell(*command)
    assert ended.code == 3
    assert "sets: there is no dataset.json" in ended.err
    assert ended.err.endswith("the data sets below it are sets/b, sets/more/a\n")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"run_id": "a", "lineage": [], "facts": {"config": []}}'])
def test_a_damaged_run_is_no_configuration(shell: Shell, here: Path, content: str) -> None:
    (here / "runs").mkdir()
    (here / "runs/run.json").write_text(content)
    ended = shell("run", "runs")
    assert ended.code == 4
    assert ended.err.startswith("error: runs/run.json is damaged")
