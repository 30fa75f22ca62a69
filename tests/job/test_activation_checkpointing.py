"""``training.gradient_checkpointing = "auto"`` in runs: one decision of all processes, which a resume keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import hardware
from gpt_simple.hooks import NoConfig, Plugin, hookimpl
from gpt_simple.testing import train_on_ranks
from tests.conftest import Shell
from tests.tiny import TinyRun, state_bytes

Machine = Callable[[int], None]
AUTO = {"training__gradient_checkpointing": "auto"}
CONSTANT = {"optimizer__schedule": "constant"}
MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with so much free memory."""
    monkeypatch.setattr(hardware, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "_CONTROL_GROUPS", ())

    def make(size: int) -> None:
        (tmp_path / "meminfo").write_text(f"MemAvailable: {size // 1024} kB\n")

    return make


def facts(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["facts"]
    return found


def decision(run: Path) -> tuple[Any, str]:
    found = facts(run)["run"]
    return found["gradient_checkpointing"], found["gradient_checkpointing_why"]


def test_the_decision_and_its_reason_are_recorded(tiny: TinyRun, tmp_path: Path, machine: Machine) -> None:
    for size, expected in ((100 * MIB, False), (MIB, True)):
        machine(size)
        tiny(str(size), training__max_steps=1, **AUTO)
        setting, why = decision(tmp_path / str(size))
        assert setting is expected
        assert why.startswith("auto: without it ")
        assert why.endswith(f" MiB are predicted, and {0.75 * size / MIB:.1f} MiB fit into this machine")
        assert facts(tmp_path / str(size))["config"]["training.gradient_checkpointing"] == "auto"


BEGAN: dict[str, tuple[Any, int, bool]] = {
    "auto, where it fits": ("auto", 100 * MIB, False),
    "auto, where it does not fit": ("auto", MIB, True),
    "true": (True, 100 * MIB, True),
    "false": (False, MIB, False),
    "every second block": (2, 100 * MIB, 2),
}


@pytest.mark.parametrize("began", BEGAN)
def test_auto_keeps_what_the_run_began_with(began: str, tiny: TinyRun, tmp_path: Path, machine: Machine) -> None:
    """Also on a machine of another size, and without calling it a change."""
    value, size, setting = BEGAN[began]
    machine(size)
    tiny("run", training__gradient_checkpointing=value, training__max_steps=3, **CONSTANT)
    machine(101 * MIB - size)
    resumed = tiny("run", **AUTO, **CONSTANT)
    assert decision(tmp_path / "run") == (setting, "auto: as the run began")
    assert facts(tmp_path / "run")["promise"] == "resumed from step 3: changed: training.max_steps 3 -> 6"
    assert state_bytes(resumed) == state_bytes(tiny("whole", training__gradient_checkpointing=setting, **CONSTANT))


@pytest.mark.parametrize(("value", "change"), [(False, ""), (True, "; training.gradient_checkpointing False -> True")])
def test_another_value_than_the_decision_is_a_change(
    value: bool, change: str, tiny: TinyRun, tmp_path: Path, machine: Machine
) -> None:
    machine(100 * MIB)
    tiny("run", training__max_steps=3, **AUTO)
    tiny("run", training__gradient_checkpointing=value)
    assert facts(tmp_path / "run")["promise"] == f"resumed from step 3: changed: training.max_steps 3 -> 6{change}"
    assert decision(tmp_path / "run") == (value, "configured")


class Reports(Plugin[NoConfig]):
    """Writes what each process computes again."""

    ranks = "all"

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        (run.output_dir / f"rank-{run.rank}").write_text(str(event.facts["gradient_checkpointing"]))


@pytest.mark.parametrize("machines", [1, 2])
def test_all_processes_take_the_decision_of_one(
    machines: int, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one machine share memory that is enough for one of them."""
    machine(MIB)
    monkeypatch.setattr("socket.gethostname", lambda: f"node{int(os.environ.get('RANK', 0)) % machines}")
    outcomes = train_on_ranks(
        Reports, output_dir=tmp_path / "run", overrides={"training.gradient_checkpointing": "auto"}
    )
    assert [outcome.error for outcome in outcomes] == ["", ""]
    expected = str(machines == 1)
    assert [(tmp_path / "run" / f"rank-{rank}").read_text() for rank in (0, 1)] == [expected, expected]


def test_the_commands_show_auto_and_what_it_means(shell: Shell, here: Path, machine: Machine) -> None:
    machine(100 * MIB)
    option = "--training.gradient_checkpointing"
    shown = shell("config", "show", "config.toml", option, "auto")
    assert 'gradient_checkpointing = "auto"' in shown.out
    settings = ("auto", "true", "false")
    lines = {name: shell("run", "config.toml", "--force", option, name).out.splitlines() for name in settings}
    (auto,) = [line for line in lines["auto"] if line.startswith("recompute")]
    (advice,) = [line for line in lines["true"] if line.startswith("recompute")]
    assert auto.startswith("recompute  no block (auto: without it ")
    assert advice.startswith('recompute  every block (configured; "auto" or false saves the time: without it ')
    assert not any(line.startswith("recompute") for line in lines["false"])
    assert "bit-exact" in shell("validate", "config.toml", option, "auto", "--json").out
