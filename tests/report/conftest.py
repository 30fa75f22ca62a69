"""The files of a run as the trainer writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run's files as the trainer writes them: two launches, the second from step 50."""

    def make(name: str, rows: list[dict[str, Any]] | None = None, **config: Any) -> Path:
        root = tmp_path / name
        root.mkdir()
        lineage = [
            {"step": 0, "from": None, "time": 1000.0, "host": "first", "pid": 1},
            {"step": 50, "from": "x", "time": 9000.0, "host": "second", "pid": 2},
        ]
        facts = {
            "config": {"training.max_steps": 100, "optimizer.learning_rate": 1e-3, **config},
            "origins": {"optimizer.learning_rate": "config.toml:3"},
            "run": {"parameters": 1234567, "device": "cpu", "precision": "no", "floor": 0.5},
        }
        (root / "run.json").write_text(json.dumps({"run_id": "abcd1234", "lineage": lineage, "facts": facts}))
        status = {"state": "completed", "step": 100, "max_steps": 100, "reason": "finished all 100 steps"}
        (root / "status.json").write_text(json.dumps(status))
        lines = rows if rows is not None else [*map(train, range(10, 101, 10)), *map(evaluated, (50, 100)), *EVENTS]
        (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        return root

    return make


def train(step: int, **more: Any) -> dict[str, Any]:
    start = 1000.0 if step <= 50 else 9000.0 - 50
    return {
        "kind": "train",
        "step": step,
        "tokens": step * 64,
        "time": start + step,
        "train/loss": 3.0 / step + 1,
        "train/lr": 1e-3,
        "train/grad_norm": 1.0 + step,
        "perf/tokens_per_second": 1e4,
        "memory/peak_gib": 0.5,
        **more,
    }


def evaluated(step: int) -> dict[str, Any]:
    return {
        "kind": "eval",
        "step": step,
        "tokens": step * 64,
        "time": train(step)["time"],
        "eval/loss": 2.0 - step / 100,
    }


def event(step: int, name: str, message: str, level: str = "info") -> dict[str, Any]:
    return {"kind": "event", "step": step, "tokens": 0, "time": 0, "name": name, "level": level, "message": message}


EVENTS = [
    event(50, "sample", "Once </pre><script>alert(1)</script> \x00\x1b[31m"),
    event(60, "w", "beware <b>", "warning"),
]
