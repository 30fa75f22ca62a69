"""The compile plan and its note."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple.config.schema import TrainingConfig
from gpt_simple.engine.compile import plan
from gpt_simple.errors import ConfigError


def note(processes: int, **changes: Any) -> str:
    config = TrainingConfig(compile=True, compile_backend="eager", **changes)
    return plan(config, torch.device("cpu"), processes, explicit=True).note


def test_the_note_names_the_setting_of_the_graph_splitter() -> None:
    flag = "torch._dynamo.config.optimize_ddp is"
    assert note(2) == f"{flag} False until the run ends (compile, DDP and gradient checkpointing together)"
    assert note(2, ddp_optimizer="split") == f"{flag} True until the run ends (training.ddp_optimizer)"
    assert note(2, gradient_checkpointing=False) == note(1) == ""
    assert note(1, ddp_optimizer="off") == 'training.ddp_optimizer "off" changes nothing: there is one process'
    assert note(2, ddp_optimizer="off", compile_scope="blocks").endswith('training.compile_scope is "blocks"')


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with these programs on its PATH, and a GPU of this compute capability."""

    def make(*programs: str, capability: tuple[int, int] = (9, 0), headers: bool = True, triton: bool = True) -> None:
        for variable in ("CC", "CXX", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("shutil.which", lambda name: name if name in programs else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(Path(__file__).parent / "headers"))
        monkeypatch.setattr(Path, "exists", lambda path: headers)

    return make


@pytest.mark.parametrize(
    ("device", "facts", "missing"),
    [
        ("cpu", {"programs": ("g++",)}, ""),
        ("cpu", {"programs": ("gcc",)}, "needs a C++ compiler and none was found: install g++"),
        ("cuda", {"programs": ("gcc",)}, ""),
        ("cuda", {"programs": ("clang",)}, ""),
        ("cuda", {"programs": ("g++",)}, "needs a C compiler and none was found: install gcc"),
        ("cuda", {"programs": ("gcc",), "capability": (6, 1)}, "compute capability 7.0, and this one has 6.1"),
        ("cuda", {"programs": ("gcc",), "headers": False}, "needs Python.h on a GPU: install python3-dev"),
        ("cuda", {"programs": ("gcc",), "triton": False}, "needs triton on a GPU"),
    ],
)
def test_each_device_asks_for_what_its_code_is_built_with(
    device: str, facts: dict[str, Any], missing: str, machine: Callable[..., None]
) -> None:
    machine(*facts.pop("programs"), **facts)
    defaulted = plan(TrainingConfig(), torch.device(device, 0), 1, explicit=False)
    assert (defaulted.enabled, missing in defaulted.warning) == (not missing, True)
    if missing:
        with pytest.raises(ConfigError, match=re.escape(missing)):
            plan(TrainingConfig(), torch.device(device, 0), 1, explicit=True)


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_variable_that_names_no_compiler(
    device: str, variable: str, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("gcc", "g++")
    monkeypatch.setenv(variable, "/nonexistent")
    assert (
        f"${variable}, /nonexistent, is none"
        in plan(TrainingConfig(), torch.device(device, 0), 1, explicit=False).warning
    )


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_variable_that_switches_the_compiler_off(
    variable: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    config = TrainingConfig(compile_backend=backend)
    made = plan(config, torch.device("cpu"), 1, explicit=False)
    assert not made.enabled
    assert f"${variable} switches torch.compile off: unset it" in made.warning
    with pytest.raises(ConfigError, match=variable):
        plan(config, torch.device("cpu"), 1, explicit=True)
