"""Where checkpoints are kept beside the run directory: the protocol of the component ``training.checkpoint_store``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gpt_simple.config.schema import Config


class CheckpointStore(Protocol):
    """A place that outlives this machine. It holds whole checkpoint directories, under names such as ``step-00001000``.

    Only the main process has one. A method reports a failure by raising any exception. It should have time limits of
    its own: the engine waits for it.
    """

    def find(self) -> Iterable[str]:
        """The names of the checkpoints that are there whole, in any order. Called once, when a launch begins."""

    def fetch(self, name: str, directory: Path) -> None:
        """Copy all files of the checkpoint ``name`` into ``directory``, which is there and empty.

        The engine compares the files with their checksums before it uses them. A failure is tried again.
        """

    def published(self, path: Path) -> None:
        """Copy the directory ``path``, whose name is the checkpoint's, into the store. It is durable when this returns.

        Called in a thread, one checkpoint at a time. A failure is tried again, and a checkpoint of this name may be
        there already, whole or in part: replace it. Write ``MANIFEST.json`` last and remove an old one first: a
        checkpoint is whole if it has one.
        """


def local(config: Config) -> None:
    """The store ``local``: the run directory alone."""
