"""What a resume says that it keeps."""

from __future__ import annotations

from typing import Any

import pytest

from gpt_simple.engine.resume import promise

SAVED: dict[str, Any] = {
    "config": {"data.seed": None, "training.seed": 1, "training.max_steps": 4, "data.curriculum": []},
    "data": {"tokenizer": "t"},
    "numerics": {"processes": 2},
}


def now(processes: int = 2, **config: Any) -> dict[str, Any]:
    changed = {key.replace("__", "."): value for key, value in config.items()}
    return {**SAVED, "config": {**SAVED["config"], **changed}, "numerics": {"processes": processes}}


ORDER = " (the order of samples is another from here on: some come twice, others not at all)"


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (now(), "bit-exact"),
        (now(1), "order-exact: same samples, other last digits (processes 2 -> 1)"),
        (now(training__max_steps=6), "changed: training.max_steps 4 -> 6"),
        (now(1, training__max_steps=6), "changed: training.max_steps 4 -> 6; processes 2 -> 1"),
        (now(training__seed=2), f"changed: training.seed 1 -> 2{ORDER}"),
        (now(data__seed=1), "changed: data.seed None -> 1"),
        (
            now(data__curriculum=[{"mix": {"a": 1.0}}]),
            f"changed: data.curriculum [] -> [{{'mix': {{'a': 1.0}}}}]{ORDER}",
        ),
    ],
)
def test_every_difference_is_told(later: dict[str, Any], expected: str) -> None:
    assert promise(SAVED, later) == expected
