"""Precision follows the device unless it is set, and what cannot train is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpt_simple import Plugin, TrainResult, hookimpl
from gpt_simple.engine.precision import resolve
from gpt_simple.errors import ConfigError
from tests.tiny import TinyRun, weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(capability: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", list)  # a CUDA build has some, without a GPU too
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: enabled)

    return pretend


@pytest.mark.parametrize("setting", [None, "auto"])
def test_a_cpu_has_no_mixed_precision_by_default(setting: str | None) -> None:
    assert resolve(setting, CPU).name == "no"


@pytest.mark.parametrize(
    ("capability", "hip", "name"),
    [
        ((8, 0), None, "bf16"),
        ((9, 0), None, "bf16"),
        ((7, 5), None, "fp16"),
        ((7, 0), None, "fp16"),
        ((7, 0), "6", "bf16"),
    ],
)
def test_auto_asks_for_the_capability_and_not_for_emulation(
    gpu: Callable[..., None], capability: tuple[int, int], hip: str | None, name: str
) -> None:
    gpu(capability, hip)
    assert resolve(None, CUDA).name == name


def test_only_fp16_scales_the_loss(gpu: Callable[..., None]) -> None:
    gpu((8, 0))
    assert [resolve(name, CUDA).scaler for name in ("fp16", "bf16", "no")] == [True, False, False]


def test_bf16_on_a_cpu_computes_in_bf16() -> None:
    precision = resolve("bf16", CPU)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^training\.mixed_precision: fp16 does not train on a CPU"):
        resolve("fp16", CPU)


def test_bf16_that_would_be_emulated_is_refused(gpu: Callable[..., None]) -> None:
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"capability 7\.5"):
        resolve("bf16", CUDA)


class Overflows(Plugin[Any]):
    """The scaled gradient of step 2 is not finite. Stops the run after step ``last``."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, last: int) -> None:
        super().__init__(None)
        self.last = last

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        if (event.step, event.micro_batch) == (2, 0):
            handle = next(run.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
            self.handles = [handle]

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 2:
            self.handles[0].remove()
        if event.step == self.last:
            run.control.stop("enough")


def scaler_of(result: TrainResult) -> dict[str, Any]:
    assert result.checkpoint_path is not None
    state: dict[str, Any] = json.loads((result.checkpoint_path / "state.json").read_text())["scaler"]
    return state


def test_a_resumed_run_keeps_its_loss_scale(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which has a scaler but no fp16: the scale doubles every two steps and is halved by an overflow."""
    real = torch.amp.GradScaler

    def scaler(device: str, enabled: bool) -> torch.amp.GradScaler:
        return real(device, init_scale=1024.0, growth_interval=2, enabled=True)

    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    part = tiny("parts", plugins=[Overflows(3)])
    assert (scaler_of(part)["scale"], scaler_of(part)["_growth_tracker"]) == (512.0, 1)
    rest = tiny("parts")
    assert (scaler_of(rest)["scale"], scaler_of(rest)["_growth_tracker"]) == (2048.0, 0)
    whole = tiny("whole", plugins=[Overflows(6)])
    assert scaler_of(rest) == scaler_of(whole)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(rest)[name], tensor, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_trains_and_resumes_on_a_gpu(tiny: TinyRun) -> None:
    options = {"training__mixed_precision": "fp16", "optimizer__learning_rate": 1e-3}
    whole = tiny("whole", plugins=[Overflows(6)], **options)
    tiny("parts", plugins=[Overflows(3)], **options)
    rest = tiny("parts", **options)
    assert scaler_of(rest) == scaler_of(whole)
    assert scaler_of(rest)["scale"] < 2.0**16
    assert rest.final_loss == pytest.approx(whole.final_loss, rel=1e-2)
    assert rest.final_loss == pytest.approx(tiny("fp32", training__mixed_precision="no").final_loss, rel=0.1)


CU126, CU130 = "sm_50 sm_70 sm_80 sm_86 sm_90 compute_90", "sm_75 sm_80 sm_86 sm_90 sm_90a sm_100 sm_120"


@pytest.mark.parametrize(
    ("capability", "built", "hint"),
    [
        ((7, 0), CU130, "cu126"),
        ((6, 1), "sm_70 sm_80", "cu126"),
        ((11, 0), CU130, "another CUDA"),
        ((7, 0), CU126, None),
        ((8, 9), CU130, None),
        ((12, 1), CU130, None),
        ((12, 0), CU126, None),  # by PTX
        ((9, 0), "sm_80 sm_90a", None),
        ((8, 0), "", None),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_refused(
    capability: tuple[int, int], built: str, hint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla X")
    if hint is None:
        assert resolve("no", CUDA).name == "no"
        return
    needed = "".join(map(str, capability))
    with pytest.raises(ConfigError, match=f"has no code for Tesla X, which needs sm_{needed}: .*{hint}"):
        resolve("no", CUDA)
