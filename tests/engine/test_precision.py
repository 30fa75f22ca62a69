"""Precision follows the device unless it is set, and what cannot train is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gpt_simple.engine.precision import resolve
from gpt_simple.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(capability: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
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
    with pytest.raises(ConfigError, match=r"config\.toml:3.*fp16 does not train on a CPU"):
        resolve("fp16", CPU, "config.toml:3 (training.mixed_precision)")


def test_bf16_that_would_be_emulated_is_refused(gpu: Callable[..., None]) -> None:
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"capability 7\.5"):
        resolve("bf16", CUDA)
