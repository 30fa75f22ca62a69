"""Plugins that observe a launch: one brings its data, one records what its last hooks find on disk."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

from attrs import field, frozen

from gpt_simple import DataConfig, Document, Plugin, hookimpl
from gpt_simple.hooks import NoConfig, Registry
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import owner_of
from gpt_simple.run_dir.status import read_status
from tests.run_dir.test_layout import snapshot

SOURCE = {"data.source": "counting", "data.val_fraction": 0.3, "data.max_documents": None}


def brings_source(when_read: Callable[[], object]) -> type[Plugin[NoConfig]]:
    """A plugin with the source ``counting``, which calls ``when_read`` when its documents are read.

    No other such plugin's data are in the cache.
    """
    token = secrets.token_hex(8)

    class Counting:
        def fingerprint(self) -> str:
            return token

        def documents(self) -> Iterator[Document]:
            when_read()
            for first in range(60):
                yield Document(" ".join(str(first + each) for each in range(9)), key=str(first))

    class BringsSource(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("source", "counting", lambda config, seed: Counting(), config=DataConfig)

    return BringsSource


@frozen
class Found:
    """What one of the last hooks finds."""

    hook: str
    ok: bool
    state: str
    step: int
    lock: str
    threads: tuple[str, ...]
    files: dict[str, object] = field(repr=False)


class Watches(Plugin[NoConfig]):
    """Called before all others at the end, where the order is reversed: its name comes after theirs."""

    def __init__(self) -> None:
        super().__init__(NoConfig())
        self.found: list[Found] = []
        self.threads = set(threading.enumerate())

    def _record(self, hook: str, run: Any, ok: bool) -> None:
        run_dir = RunDir(run.output_dir)
        status = read_status(run_dir)
        threads = tuple(sorted(thread.name for thread in set(threading.enumerate()) - self.threads))
        files = snapshot(run.output_dir)
        self.found.append(Found(hook, ok, status.state, status.step, owner_of(run_dir)[1], threads, files))

    @hookimpl
    def on_run_error(self, run: Any, event: Any) -> None:
        self._record("on_run_error", run, False)

    @hookimpl
    def on_close(self, run: Any, event: Any) -> None:
        self._record("on_close", run, event.ok)
