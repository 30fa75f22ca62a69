"""The prepared day on a GPU passes on one that computes nothing, before it meets a real one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.nullgpu.conftest import Json
from tests.nullgpu.device import ROOT, NullGpu

SCRIPT = ROOT / "benchmarks" / "gpu.py"
DAY = runpy.run_path(str(SCRIPT))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


def rehearse(gpu: NullGpu, out: Path, *options: object, count: int = 1) -> tuple[Json, str]:
    """The results of all parts in one call, as JSON and Markdown."""
    words = [SCRIPT, "--out", out, "--tiny", *map(str, options)]
    done = gpu.run(words, gpu.environment(count=count), seconds=5400)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


@pytest.fixture(scope="module")
def one_device(gpu: NullGpu, tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, str]:
    return rehearse(gpu, tmp_path_factory.mktemp("day"))


@pytest.fixture(scope="module")
def two_devices(gpu: NullGpu, tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, str]:
    return rehearse(gpu, tmp_path_factory.mktemp("day"), "--devices", 2, count=2)


def assert_passed(part: str, results: tuple[Json, str]) -> None:
    found, text = results
    wrong = [check["what"] for check in found[part]["checks"] if check["right"] is False]
    assert (found[part]["ended"], wrong) == ("ok", []), found[part].get("log")
    assert found[part]["lines"]
    assert f"## {part}\n" in text


@pytest.mark.parametrize("part", DAY["PARTS"])
def test_a_part_passes_with_tiny_sizes(part: str, one_device: tuple[Json, str]) -> None:
    assert_passed(part, one_device)


@pytest.mark.parametrize("part", DAY["SEVERAL"])
def test_a_part_passes_on_two_devices(part: str, two_devices: tuple[Json, str]) -> None:
    assert_passed(part, two_devices)
