"""The peak arithmetic of known GPUs."""

from __future__ import annotations

import pytest

from gpt_simple.hardware import peak_flops


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
def test_peaks_are_dense_and_tf32_without_mixed_precision(name: str, bf16: float | None, without: float) -> None:
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
