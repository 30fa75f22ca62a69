"""Where a run writes, and how much space it needs there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt_simple.config.schema import TrainingConfig
from gpt_simple.preflight.output import most_checkpoints
from tests.conftest import Shell
from tests.preflight.conftest import Check


def test_the_size_of_a_checkpoint_is_known_beforehand(check: Check, shell: Shell, here: Path) -> None:
    arguments = ["--model.n_layer=2", "--training.max_steps=40", "--training.eval_steps=1", "--training.save_steps=40"]
    finding = check(*arguments)["output"]
    assert "MiB for up to 1 checkpoint of at most" in finding["message"]
    assert shell("run", "config.toml", "-q", *arguments).code == 0
    files = {file.name: file.stat().st_size for file in (here / "out/checkpoints/step-00000040").iterdir()}
    tensors = files["model.safetensors"] + files["optimizer.safetensors"]
    assert tensors * 0.95 < sum(files.values()) <= finding["fields"]["checkpoint_bytes"] <= sum(files.values()) * 1.05


def test_too_little_room_is_a_warning_and_none_at_all_an_error(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    size = check()["output"]["fields"]["checkpoint_bytes"]
    for free, code, severity in ((size, 0, "warning"), (size // 2, 4, "error")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        found = check(code=code)["space-short"]
        assert (found["severity"], found["fields"]["free"]) == (severity, free)


def test_a_run_that_cannot_save_is_refused_unless_it_is_finished(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert shell("run", "config.toml", "-q").code == 0
    assert "could save nothing" in shell("run", "config.toml", "-q", "--training.max_steps=6").err
    # What --force discards makes the room.
    assert shell("validate", "config.toml", "--force").code == 0


def test_a_run_that_a_plugin_finished_needs_no_room(
    shell: Shell, check: Check, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "enough.py").write_text(
        "from gpt_simple import Plugin, hookimpl\nclass Enough(Plugin):\n    @hookimpl\n"
        "    def on_step_end(self, run):\n        run.control.finish('enough')\n"
    )
    enough = ("-p", "./enough.py")
    assert shell("run", "config.toml", "-q", *enough).code == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert shell("run", "config.toml", "-q", *enough).code == 0
    found = check(*enough, "--device=h100")
    assert found["output"]["fields"]["needed"] == 0
    assert found["runtime"]["fields"]["steps_left"] == 0
    assert found["resume"]["fields"]["step"] == 1
    assert "could save nothing" in shell("run", "config.toml", "-q", *enough, "--training.max_steps=6").err


def test_an_output_that_cannot_be_written(check: Check) -> None:
    assert "config.toml" in check("--training.output_dir=config.toml", code=2)["output-refused"]["message"]


def test_how_many_checkpoints_there_are_at_once() -> None:
    assert most_checkpoints(TrainingConfig(max_steps=10, save_steps=1, keep_last_k=None)) == 10
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=1, keep_last_k=3, eval_steps=None)) == 4
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=1, keep_last_k=1, eval_steps=5)) == 4
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=10, keep_last_k=3, keep_milestone_every=50)) == 5
    # At the end the newest three and the eight older milestones; the steps between them are not evaluated.
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=5, keep_last_k=3, keep_milestone_every=10)) == 12
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=None, keep_last_k=3)) == 1
