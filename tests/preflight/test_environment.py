"""This machine as a check sees it: packages, compiler, backends and a key of W&B."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_simple.preflight.environment import check_environment
from tests.cli.test_bad_input import snapshot
from tests.conftest import CONFIG, Shell
from tests.preflight.conftest import Check


def test_the_environment_is_reported(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert check()["environment"]["fields"]["packages"]["torch"]
    written = check("--training.compile=true", code=2)["compiler-missing"]
    assert written["severity"] == "error"


def test_a_defaulted_compile_without_a_compiler_is_a_warning(
    check: Check, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    (here / "config.toml").write_text(CONFIG.replace("compile = false\n", ""))
    assert check()["compiler-missing"]["severity"] == "warning"


@pytest.mark.parametrize("command", ["validate", "run"])
def test_an_unknown_backend_is_refused_before_anything_exists(shell: Shell, here: Path, command: str) -> None:
    before = snapshot(here)
    arguments = ["--training.compile=true", "--training.compile_backend=foo"]
    ended = shell(command, "config.toml", *arguments)
    assert ended.code == 2
    said = " ".join((ended.out + ended.err).split())
    assert "--training.compile_backend: torch has no backend 'foo'" in said
    assert "inductor" in said
    assert snapshot(here) == before


def test_a_missing_compiler_of_the_environment_is_named(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexist")
    assert "no /nonexist here" in check("--training.compile=true", code=2)["compiler-missing"]["message"]


def test_wandb_that_is_meant_to_be_offline_needs_no_key(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.preflight.environment._has_netrc_entry", lambda host: False)
    project = "--training.wandb_project=stories"
    assert check(project)["wandb-offline"]["severity"] == "warning"
    assert "wandb-offline" not in check(project, "--plugins.wandb.mode=offline")
    assert "could not be logged" in check(project, "--plugins.wandb.mode=online")["wandb-offline"]["message"]


@pytest.mark.parametrize(
    ("visible", "cards"),
    [
        (None, ["H100", "L4"]),
        ("", []),
        ("-1", []),
        ("0", ["H100"]),
        ("1, 0", ["L4", "H100"]),
        ("GPU-1234", ["L4"]),
        ("7", []),
        ("0,7,1", ["H100"]),
        ("NoDevFiles", []),
        ("MIG-77", ["MIG slice"]),
    ],
)
def test_the_gpus_that_a_process_sees(
    visible: str | None, cards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (model, uuid) in enumerate([("H100", "GPU-0001-aa"), ("L4", "GPU-1234-bb")]):
        folder = tmp_path / "gpus" / f"0000:0{number}"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t {model}\nIRQ: 1\nGPU UUID: \t {uuid}\n")
    monkeypatch.setattr("gpt_simple.hardware._DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert check_environment([]).gpus == cards


def test_a_gpu_whose_driver_is_not_in_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.hardware._DRIVER", tmp_path)
    monkeypatch.setattr("gpt_simple.hardware._DEVICES", (tmp_path / "dxg",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert check_environment([]).gpus == []
    (tmp_path / "dxg").touch()
    assert check_environment([]).gpus == ["NVIDIA GPU that /proc does not list"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert check_environment([]).gpus == []
