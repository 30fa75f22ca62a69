"""Shared by all tests: prepared data in one cache for the session, and no trace of the user's environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of one process share, so that the stories are tokenized once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, data_cache: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("GPT_SIMPLE", "ACCELERATE_", "WANDB_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(data_cache))
    yield
