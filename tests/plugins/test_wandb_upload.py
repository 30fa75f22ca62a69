"""``gpt-simple wandb upload``: a run that W&B has not seen, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Shell
from tests.plugins.offline import read, sent
from tests.tiny import TinyRun

wandb = pytest.importorskip("wandb")


def test_upload_replays_the_run_once_and_in_order(tiny: TinyRun, shell: Shell) -> None:
    result = tiny(training__max_steps=4, training__eval_steps=2)
    metrics = result.output_dir / "metrics.jsonl"
    again = {
        "kind": "train",
        "step": 4,
        "tokens": 9,
        "time": 1e9,
        "train/loss": None,
        "train/lr": 1.0,
        "train/grad_norm": None,
        "nonfinite": {"train/loss": "nan", "train/grad_norm": "-inf"},
    }
    metrics.write_text(metrics.read_text() + json.dumps(again) + "\n")
    refused = shell("wandb", "upload", str(result.output_dir), "--offline")
    assert (refused.code, "--project" in refused.err) == (2, True)
    done = shell("wandb", "upload", str(result.output_dir), "--offline", "--project", "p", "--name", "n")
    assert done.code == 0, done.err
    (launch,) = sent(result.output_dir)
    assert launch.id == json.loads((result.output_dir / "run.json").read_text())["run_id"]
    trained = [row for row in launch.rows if "train/lr" in row]
    assert [row["step"] for row in trained] == [2, 4]
    assert (trained[-1]["train/loss"], trained[-1]["train/lr"], trained[-1]["_timestamp"]) == ("NaN", 1.0, 1e9)
    assert trained[-1]["train/grad_norm"] == "-Infinity"
    assert [row["step"] for row in launch.rows if "eval/loss" in row] == [2, 4]
    assert launch.config["training"]["max_steps"] == 4
    assert launch.summary["status"] == "completed"


def test_a_run_partly_on_the_server_is_uploaded_under_another_id(
    tiny: TinyRun, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tiny(training__wandb_project="p", plugins__wandb__mode="offline")
    own, init = json.loads((result.output_dir / "run.json").read_text())["run_id"], wandb.init

    def server(**options: Any) -> Any:
        if (options["id"], options["resume"]) == (own, "never"):
            raise wandb.UsageError(f"Run ({own}) already exists, but your `resume` setting does not allow resuming")
        return init(**{**options, "mode": "offline"})

    monkeypatch.setattr(wandb, "init", server)
    refused = shell("wandb", "upload", str(result.output_dir))
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert f"add --id {own}-upload" in refused.err
    done = shell("wandb", "upload", str(result.output_dir), "--id", f"{own}-upload")
    assert done.code == 0, done.err
    (directory,) = result.output_dir.glob(f"wandb/*-{own}-upload")
    assert f"wandb sync {directory}`" in done.out
    assert "sync only this one: the 1 before it" in done.out
    whole = read(next(directory.glob("*.wandb")))
    assert whole.id == f"{own}-upload"
    assert [row["step"] for row in whole.rows if "train/loss" in row] == [2, 4, 6]


def test_upload_of_no_run_exits_4(shell: Shell, here: Path) -> None:
    ended = shell("wandb", "upload", "nowhere")
    assert ended.code == 4
    assert "there is no run in nowhere" in ended.err
    file = shell("wandb", "upload", "config.toml")
    assert (file.code, file.err.count("\n")) == (4, 1)
