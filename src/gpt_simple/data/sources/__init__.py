"""Where documents come from.

A source is named in the configuration (``data.source``) and built by ``build(config, seed)``. It yields its documents,
always in the same order, and has a fingerprint of all that they depend on: what was prepared from it is used again
until the fingerprint changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import frozen

from gpt_simple.hooks.batch import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

Weights = Callable[["NDArray[Any]", "NDArray[Any]", Tokenizer], "NDArray[Any]"]
"""The method of ``WeighsTargets``."""


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
    """Documents that cannot be prepared before a run: too many, or still being written.

    Every process reads the whole stream. A resume reads it again up to where the run stopped. Nothing is shuffled.
    """

    def fingerprint(self) -> str:
        """Changes whenever the documents do; the prepared beginning is kept under it."""

    def stream(self) -> Iterator[Document]:
        """All documents from the first on, in the same order each time; resuming depends on it."""


class WeighsTargets(Protocol):
    """A source or a stream whose targets have factors in the training loss."""

    def weights(self, input_ids: NDArray[Any], labels: NDArray[Any], tokenizer: Tokenizer) -> NDArray[Any]:
        """The factor of each target, finite numbers of shape [n, T], for n whole rows.

        ``input_ids`` and ``labels`` are int64 [n, T], and -100 is no target. It must be a pure function of each row,
        which threads may call, and ``fingerprint`` changes whenever it does. An evaluation has no weights.
        """
