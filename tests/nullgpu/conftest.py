"""The null GPU for the checks here. They run only if their folder is named: they take minutes and a CUDA torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import VISIBLE
from tests.nullgpu.device import CARDS, ROOT, Card, NullGpu, Unavailable

Json = dict[str, Any]
Measured = Callable[..., Json]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if any("nullgpu" in argument for argument in config.args) else True


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The null GPU is hidden, too, by what hides real ones from the tests."""
    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def gpu() -> NullGpu:
    try:
        return NullGpu.build(ROOT / "build" / "nullgpu")
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def measured(gpu: NullGpu) -> Measured:
    """The answer of a program of this folder; one process for each program, card and argument."""
    answers: dict[tuple[str, Card, str], Json] = {}

    def measure(program: str, argument: object, card: Card = CARDS["h100"]) -> Json:
        key = (program, card, json.dumps(argument, sort_keys=True))
        if key not in answers:
            done = gpu.run(["-m", f"tests.nullgpu.{program}", json.dumps(argument)], gpu.environment(card))
            assert done.returncode == 0, done.stderr[-3000:]
            answers[key] = json.loads(done.stdout.splitlines()[-1])
        return answers[key]

    return measure
