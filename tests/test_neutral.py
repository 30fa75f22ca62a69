"""The tests are neutral to the machine: a GPU is hidden from those that do not ask for one."""

from __future__ import annotations

import os

import pytest
import torch

from tests.conftest import VISIBLE, selects_gpus


def test_gpus_are_hidden_from_the_tests(request: pytest.FixtureRequest) -> None:
    hidden = not selects_gpus(request.config.option.markexpr)
    assert [os.environ.get(name) == "" for name in VISIBLE] == [hidden] * len(VISIBLE)
    assert not (hidden and torch.cuda.is_available())


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("", False), ("gpu", True), ("not gpu", False), ("not  slow and gpu", True), ("not slow", False)],
)
def test_only_the_marker_brings_gpus_back(expression: str, expected: bool) -> None:
    assert selects_gpus(expression) is expected
