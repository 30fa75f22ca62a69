"""Files of earlier versions still work: runs resume, data sets are read, plugins are called.

``vX_Y_Z`` holds the files of a version, as ``make_example.py`` made them with it; see CONTRIBUTING.md.
``expected.json`` has the result of the whole run. Its last digits depend on the processor and on torch. Where these are
as recorded, the weights must be equal to the bit; elsewhere the samples must be the same and the losses agree to 1e-5.
In any case two launches from the kept checkpoint must end with the same bits as one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.make_example import PLUGIN, RUNS, TOKENIZE, outcome
from tests.conftest import Shell

FOLDERS = sorted(Path(__file__).parent.glob("v*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def example(request: pytest.FixtureRequest, here: Path) -> Path:
    """The current directory, with a copy of the files of a version."""
    shutil.copytree(request.param, here, dirs_exist_ok=True)
    return here


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def expected(example: Path, run: str) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((example / "expected.json").read_text())[run]
    return recorded


def assert_as_recorded(came: dict[str, Any], recorded: dict[str, Any]) -> None:
    assert (came["step"], came["rows"]) == (recorded["step"], recorded["rows"])
    assert came["losses"] == pytest.approx(recorded["losses"], rel=1e-5)
    if same_numerics(came, recorded):
        assert came["weights"] == recorded["weights"]


def same_numerics(came: dict[str, Any], recorded: dict[str, Any]) -> bool:
    return all(came["numerics"].get(name) == value for name, value in recorded["numerics"].items())


def test_a_run_goes_on_to_the_recorded_weights(
    example: Path, run: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("runs", "copy")
    ended = shell("run", f"{run}.toml", *PLUGIN)
    came, recorded = outcome(example / "runs" / run), expected(example, run)
    assert ended.code == 0, ended.err
    guarantee = "bit-exact" if same_numerics(came, recorded) else "order-exact"
    assert f"resumed from step 4: {guarantee}" in ended.out
    assert_as_recorded(came, recorded)

    shutil.rmtree("runs")
    Path("copy").rename("runs")
    monkeypatch.setenv("STOP_AFTER", "6")
    assert shell("run", f"{run}.toml", *PLUGIN).code == 75
    assert shell("run", f"{run}.toml", *PLUGIN).code == 0
    assert outcome(example / "runs" / run) == came


def test_training_anew_takes_the_same_rows(example: Path, run: str, shell: Shell) -> None:
    assert shell("run", f"{run}.toml", *PLUGIN, "--training.output_dir", "new").code == 0
    assert_as_recorded(outcome(example / "new"), expected(example, run))


def test_the_plugin_gets_its_state_and_every_event(example: Path, run: str, shell: Shell) -> None:
    before = (example / "runs" / run / "rows.jsonl").read_text()
    consumed = json.loads((example / "runs" / run / "summary.json").read_text())["total_tokens"]
    ended = shell("run", f"{run}.toml", *PLUGIN)
    assert "rows goes on after 4 steps" in ended.out
    assert "a short run" in ended.out + ended.err
    after = (example / "runs" / run / "rows.jsonl").read_text()
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    losses = expected(example, run)["losses"]
    assert rows[0] == {"event": "start", "step": 4, "tokens": consumed, "resumed": True}
    metrics = [row for row in rows if row["event"] == "metrics"]
    assert [row["step"] for row in metrics] == [5, 6, 7, 8]
    assert [row["loss"] for row in metrics] == pytest.approx([losses[str(step)] for step in range(5, 9)], abs=2e-4)
    assert [row["event"] for row in rows if row["event"] != "metrics"] == ["start", "saved", "eval", "end"]
    assert "eval/rows_loss" in next(row["names"] for row in rows if row["event"] == "eval")
    assert rows[-1] == {"event": "end", "status": "completed", "step": 8}
    summary = json.loads((example / "runs" / run / "summary.json").read_text())
    assert expected(example, run)["rows"] in json.dumps(summary)


def test_the_commands_read_the_run(example: Path, run: str, shell: Shell) -> None:
    status = shell("status", f"runs/{run}", "--json")
    assert (json.loads(status.out)["state"], json.loads(status.out)["step"]) == ("stopped", 4)
    assert shell("report", f"runs/{run}", "-o", "report.html").code == 0
    loss = f"{expected(example, run)['losses']['4']:.4f}"
    assert loss in (example / "report.html").read_text()
    sampled = shell("sample", f"runs/{run}", "--prompt", "Once", "--tokens", "5")
    assert sampled.code == 0, sampled.err
    assert sampled.out.startswith("Once")
    checked = shell("validate", f"{run}.toml", *PLUGIN)
    assert checked.code == 0, checked.err
    assert "step 4" in checked.out


def test_the_commands_read_the_plugin(example: Path, shell: Shell) -> None:
    listed = shell("plugins", "list", "--config", "stories.toml", *PLUGIN)
    assert listed.code == 0, listed.err
    assert "rows" in listed.out
    checked = shell("plugins", "check", "./rows.py")
    assert checked.code == 0, checked.out + checked.err


def test_a_data_set_is_read_and_made_again(example: Path, shell: Shell) -> None:
    assert shell("data", "inspect", "dataset").code == 0
    assert shell("tokenize", "--input_dir", "text", "--output_dir", "again", *TOKENIZE).code == 0
    made = {path.relative_to("again"): path.read_bytes() for path in Path("again").rglob("*") if path.is_file()}
    del made[Path("tokenize.json")]  # it identifies the text by the times of its files
    assert {name: (Path("dataset") / name).read_bytes() for name in made} == made
