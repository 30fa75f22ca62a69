"""A run whose memory is used up, or whose device is lost: one error wherever it happens, and the next launch resumes.

The fakes replace functions of torch, which fail as on a device.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import hookimpl
from gpt_simple.errors import DeviceLost, ExitCode, OutOfMemory
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.status import read_status
from tests.children import At, Everywhere
from tests.tiny import TinyRun

OUT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
)
LOST = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"


@pytest.fixture(autouse=True)
def garbage_is_collected_again() -> Iterator[None]:
    yield
    gc.unfreeze()


Break = Callable[[pytest.MonkeyPatch, Exception], list[Any]]
"""Makes a run fail with the error, after its first checkpoint; returns the plugins that it needs."""


def fails(owner: Any, name: str, when: Callable[[], bool] = lambda: True) -> Break:
    def install(patch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
        real = getattr(owner, name)

        def fake(*arguments: Any, **named: Any) -> Any:
            if armed and when():
                raise error
            return real(*arguments, **named)

        armed: list[bool] = []
        patch.setattr(owner, name, fake)
        return [At("on_step_end", 2, lambda run: armed.append(True))]

    return install


def in_hook(hook: str) -> Break:
    def install(patch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
        def fail(run: Any) -> None:
            raise error

        return [At(hook, 3, fail)]

    return install


class OwnState(Everywhere):
    """Its state cannot be made once ``error`` is set."""

    error: Exception | None = None

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.step = event.step

    def state_dict(self) -> dict[str, Any]:
        if self.step == 3 and self.error is not None:
            raise self.error
        return {"step": self.step}


def in_state(patch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
    patch.setattr(OwnState, "error", error)
    return [OwnState()]


PLACES: dict[str, Break] = {
    "forward": fails(torch.nn.functional, "scaled_dot_product_attention", torch.is_grad_enabled),
    "backward": fails(torch.Tensor, "backward"),
    "optimizer": fails(torch.optim.AdamW, "step"),
    "evaluation": fails(torch.nn.functional, "scaled_dot_product_attention", lambda: not torch.is_grad_enabled()),
    "save": fails(torch.Tensor, "cpu"),
    "hook": in_hook("on_step_end"),
    "gradients": in_hook("on_gradients"),
    "state of a plugin": in_state,
}


@pytest.mark.parametrize("place", PLACES)
def test_used_up_memory_is_one_error_anywhere(
    place: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"training__save_steps": 1, "training__eval_steps": 3, "training__max_steps": 4}
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory) as caught:
        tiny("run", plugins=PLACES[place](patch, torch.OutOfMemoryError(OUT)), **options)
    text = str(caught.value)
    assert "out of memory" in text
    assert "Tried to allocate 2.00 GiB" in text
    assert "set training.per_device_batch_size to" in text
    assert "gpt-simple validate" in text
    assert caught.value.exit_code == ExitCode.FAILURE
    status = read_status(RunDir(tmp_path / "run"))
    assert status.state == "failed"
    assert "out of memory" in str(status.error)
    plugins = [OwnState()] if place == "state of a plugin" else []
    resumed = tiny("run", plugins=plugins, **options)
    assert (resumed.status, resumed.steps) == ("completed", 4)


def loader_of(error: BaseException) -> Any:
    """The loader in a frame that the error has left."""
    assert error.__cause__ is not None
    frames = [frame for frame, _ in traceback.walk_tb(error.__cause__.__traceback__)]
    return next(frame.f_locals["trainer"] for frame in frames if frame.f_code.co_name == "run_to_end").run.loader


@pytest.mark.parametrize("place", PLACES)
def test_a_lost_device_is_one_error_anywhere(
    place: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"training__save_steps": 1, "training__eval_steps": 3, "training__max_steps": 4}
    with monkeypatch.context() as patch, pytest.raises(DeviceLost, match="is lost: every call fails") as caught:
        tiny("run", plugins=PLACES[place](patch, torch.AcceleratorError(LOST)), **options)
    assert "plugin" not in str(caught.value)
    assert next(loader_of(caught.value)._steps, None) is not None  # its rows are kept: freeing them would abort
    status = read_status(RunDir(tmp_path / "run"))
    assert status.state == "failed"
    assert "is lost" in str(status.error)
    assert tiny("run", plugins=[OwnState()] if place == "state of a plugin" else [], **options).steps == 4


def test_a_plugin_that_the_run_can_do_without_is_switched_off(
    tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hungry(Everywhere):
        ranks = "main"
        on_error = "disable"

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            raise torch.OutOfMemoryError(OUT)

    assert tiny("run", plugins=[Hungry()]).status == "completed"
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in capsys.readouterr().out


def test_a_lost_device_switches_no_plugin_off(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    class Unlucky(Everywhere):
        ranks = "main"
        on_error = "disable"

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            raise torch.AcceleratorError(LOST)

    with pytest.raises(DeviceLost):
        tiny("run", plugins=[Unlucky()])
    assert "switched off" not in capsys.readouterr().out


BUDGET = {"training__compile": True, "training__compile_backend": "aot_eager"}


@pytest.mark.parametrize(
    ("rows", "options", "advice"),
    [
        (8, {}, "per_device_batch_size to 4 and training.gradient_accumulation_steps to 4: a step has the same rows"),
        (3, {}, "per_device_batch_size to 1 and training.gradient_accumulation_steps to 6: a step has the same rows"),
        (1, {}, "set training.gradient_checkpointing to true; `gpt-simple validate CONFIG --fit`"),
        (1, {"training__gradient_checkpointing": True}, "shorten data.max_length, or make the model smaller"),
        (1, {"training__gradient_checkpointing": "auto"}, "set training.gradient_checkpointing to true; `gpt-simple"),
        (
            1,
            {**BUDGET, "training__activation_memory_budget": 0.5},
            "lower training.activation_memory_budget; `gpt-simple",
        ),
        (
            1,
            {**BUDGET, "training__activation_memory_budget": 0.0},
            "shorten data.max_length, or make the model smaller",
        ),
    ],
)
def test_the_advice_keeps_the_size_of_a_step(
    rows: int, options: dict[str, Any], advice: str, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = in_hook("on_gradients")(monkeypatch, torch.OutOfMemoryError(OUT))
    with pytest.raises(OutOfMemory) as caught:
        tiny("run", plugins=plugins, training__per_device_batch_size=rows, **options)
    assert advice in str(caught.value)
