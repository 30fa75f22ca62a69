"""A checkpoint store for tests: a directory, which fails when it is asked to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from gpt_simple import Plugin, hookimpl
from gpt_simple.hooks import Registry


@frozen
class FolderConfig:
    path: str = ""


class FolderStore:
    """Checkpoints in a directory. ``before(method, name)`` is called first in every method, and may raise."""

    before: Callable[[str, str], object] = staticmethod(lambda method, name: None)

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self) -> Iterator[str]:
        self.before("find", "")
        return (path.parent.name for path in sorted(self.root.glob("step-*/MANIFEST.json")))

    def fetch(self, name: str, directory: Path) -> None:
        self.before("fetch", name)
        for path in (self.root / name).iterdir():
            shutil.copy(path, directory, follow_symlinks=False)

    def published(self, path: Path) -> None:
        target = self.root / path.name
        self.before("published", path.name)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in sorted(path.iterdir(), key=lambda file: file.name == "MANIFEST.json"):
            self.before("copy", file.name)
            shutil.copy(file, target)

    def removed(self, name: str) -> None:
        self.before("removed", name)
        shutil.rmtree(self.root / name)


class KeepingStore(FolderStore):
    """Keeps what is in it."""

    removed = property()  # type: ignore[assignment]


def build(config: Any) -> FolderStore:
    return FolderStore(Path(config.plugins.tables["folder"].path))


def build_keeping(config: Any) -> FolderStore:
    return KeepingStore(Path(config.plugins.tables["folder"].path))


class Folder(Plugin[FolderConfig]):
    """Brings the stores ``folder`` and ``keeping``."""

    Config = FolderConfig

    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("store", "folder", build)
        registry.add("store", "keeping", build_keeping)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the store. Attempts follow one another at once."""
    monkeypatch.setattr("gpt_simple.engine.mirror._PAUSES", (0.01, 0.01))
    monkeypatch.setattr("gpt_simple.engine.mirror._LONGEST_PAUSE", 0.01)
    return tmp_path / "store"


def held(root: Path) -> list[int]:
    """The steps of the checkpoints in a directory."""
    return sorted(int(path.parent.name[5:]) for path in root.glob("step-*/MANIFEST.json"))
