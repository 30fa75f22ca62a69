"""Where documents come from.

A source is named in the configuration (``data.source``) and built by ``build(config, seed)``. It knows how to
tell its documents, always in the same order, and a fingerprint of all that they depend on, so that what was
prepared from it can be used again until it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from attrs import frozen


@frozen
class Document:
    """One document.

    ``key`` decides by its hash whether the document is held out: documents with one key are never separated.
    ``nats`` is minus the log-probability of the text, and of ending there, under the source; None if unknown.
    """

    text: str
    key: str
    nats: float | None = None


class Source(Protocol):
    """A finite, repeatable sequence of documents."""

    def fingerprint(self) -> str:
        """Changes whenever the documents do."""

    def documents(self) -> Iterator[Document]:
        """All documents, in the same order each time. Raises DataError that names the place of a bad one."""


@runtime_checkable
class Stream(Protocol):
    """Documents that are not known before a run: too many to prepare, or still being written. See data/stream.py."""

    def fingerprint(self) -> str:
        """Changes whenever the documents do; what was prepared of the beginning is kept under it."""

    def stream(self) -> Iterator[Document]:
        """All documents from the first on, in the same order each time; resuming depends on it."""
