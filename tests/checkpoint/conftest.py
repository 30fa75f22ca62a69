"""What the tests of checkpoints share: small checkpoints whose content is their step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt_simple.checkpoint.draft import Published
from gpt_simple.checkpoint.store import Checkpoint, Store


def publish(store: Store, step: int, *, salt: int = 0) -> Published:
    """A checkpoint in which every value is ``step + salt``; all have the same size."""
    value = float(step + salt)
    return store.publish(
        step,
        tensors={
            "model": {"head.weight": torch.full((8, 4), value), "head.bias": torch.full((8,), value)},
            "optimizer": {"exp_avg.head.weight": torch.full((8, 4), value)},
        },
        documents={"state": {"step": step, "value": value}, "plugins": {}},
    )


def assert_whole(store: Store, checkpoint: Checkpoint, *, values: set[float] | None = None) -> None:
    """The checkpoint verifies and every part of it is of the same moment."""
    store.verify(checkpoint)
    values = {float(checkpoint.step)} if values is None else values
    value = store.load_document(checkpoint, "state")["value"]
    assert value in values
    for stem in ("model", "optimizer"):
        assert all(torch.all(t == value) for t in store.load_tensors(checkpoint, stem).values())


def hidden_names(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.iterdir() if path.name.startswith("."))


def steps(store: Store) -> list[int]:
    return [checkpoint.step for checkpoint in store.list()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")
