"""A micro-batch of the data, and the tokenizer that made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from attrs import frozen

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@frozen(eq=False)
class Batch:
    """A micro-batch of one process, on the device. All tensors are int64 [B, T], but for ``weights``.

    ``labels`` are the next tokens, -100 where there is no target; ``targets`` is the number of the others.
    ``position_ids`` and ``document_ids`` are set with ``data.document_mask``: positions restart in every document, and
    attention stays within one document id. ``first_sample`` is the index of the first row in the order of samples, in
    an evaluation among the rows evaluated. Where ``training.warmup_stages`` shorten rows, each ``data.max_length / T``
    rows are one sample. ``weights`` (float32 [B, T]) are the factors of the targets in the loss; None in an evaluation
    and where the source gives none. The sum is divided by the number of targets, not by that of their weights.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    document_ids: Tensor | None
    first_sample: int
    targets: int
    weights: Tensor | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """The interface that training needs of a tokenizer."""

    @property
    def name(self) -> str:
        """A readable name, for people."""

    @property
    def vocab_size(self) -> int:
        """The number of ids; every id is below it."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document. No text encodes to it."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that determines ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the end of a document."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def token_bytes(self) -> NDArray[np.int32]:
        """The number of bytes of text of each id, shape [vocab_size]; 0 for special tokens."""

    def save(self, directory: Path) -> None:
        """Write it so that ``load_tokenizer(directory)`` returns an equal one. The directory may be missing."""
