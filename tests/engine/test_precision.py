"""Precision follows the device unless it is set, and what cannot train is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gpt_simple.engine.precision import resolve
from gpt_simple.errors import ConfigError
from gpt_simple.hardware import peak_flops

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
    with pytest.raises(ConfigError, match=r"^training\.mixed_precision: fp16 does not train on a CPU"):
        resolve("fp16", CPU)


def test_bf16_that_would_be_emulated_is_refused(gpu: Callable[..., None]) -> None:
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"capability 7\.5"):
        resolve("bf16", CUDA)


@pytest.mark.parametrize(
    ("name", "bf16", "without"),
    [
        ("NVIDIA H200", 989e12, 494e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("A100-PCIE-40GB", 312e12, 156e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("GeForce RTX 3090", 71e12, 35.6e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("Tesla T4", None, 8.1e12),
    ],
)
def test_the_peak_of_a_known_device_is_dense_and_without_mixed_precision_that_of_tf32(
    name: str, bf16: float | None, without: float
) -> None:
    assert (peak_flops(name, "bf16"), peak_flops(name, "no")) == (bf16, without)
    assert peak_flops("cpu (2 threads)", "no") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA A100X",
        "NVIDIA L40",
        "NVIDIA L4-24Q",
        "NVIDIA A10",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA T400 4GB",
        "Quadro T4000",
        "Tesla V100S-PCIE-32GB",
    ],
)
def test_a_device_with_a_similar_name_has_no_peak(name: str) -> None:
    assert [peak_flops(name, precision) for precision in ("bf16", "fp16", "no")] == [None] * 3
