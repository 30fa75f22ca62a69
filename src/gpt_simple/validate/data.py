"""The data of a run, from manifests and directory listings: what is there and how far it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from gpt_simple.config.schema import Config, DataConfig
from gpt_simple.data.locate import check, find, order_seed
from gpt_simple.data.manifest import SplitRecord
from gpt_simple.data.sources import Source
from gpt_simple.data.sources.files import Files
from gpt_simple.data.sources.shards import Shards
from gpt_simple.data.tokenizer import BYTE_IDS, load_tokenizer
from gpt_simple.hooks.components import Registry

if TYPE_CHECKING:
    from gpt_simple.data.mixture import Mixture

HASHED = 64 * 2**20
"""Raw files up to this many bytes are hashed to see whether they were prepared before (some hundredths of a second)."""

BYTES_PER_TOKEN = 3.5
"""English under a byte-level BPE of some thousand ids; larger vocabularies reach 4.5."""


@frozen
class DataOutlook:
    """What is known of the data. ``estimated``: nothing is prepared yet, so numbers of tokens are guesses.

    ``vocab_size`` is that of the tokenizer, at most, and None where only training it would tell. ``train_tokens`` and
    ``val_tokens`` count targets, None where nobody knows. ``total`` is the number of rows there are to read, None where
    they are read again or nobody knows; ``order`` is the order of a curriculum.
    """

    source: str
    directory: Path | None
    vocab_size: int | None
    estimated: bool
    text_bytes: int | None
    train_tokens: int | None
    val_tokens: int | None
    buckets: Mapping[str, int]
    val_rows: int
    fingerprints: Mapping[str, str] | None
    total: int | None = None
    order: Mixture | None = None

    def ends(self, samples: int) -> dict[str, int]:
        """Buckets without an unread row after ``samples`` samples, each with the first sample at which it had none."""
        assert self.order is not None
        taken = self.order.taken(samples)
        return {
            name: self._first_without(number, rows, samples)
            for number, (name, rows) in enumerate(self.buckets.items())
            if rows and taken[number] >= rows
        }

    def _first_without(self, bucket: int, rows: int, samples: int) -> int:
        low, high = 0, samples
        while low < high:
            middle = (low + high) // 2
            if self.order is not None and self.order.taken(middle)[bucket] >= rows:
                high = middle
            else:
                low = middle + 1
        return low


def look(config: Config, registry: Registry) -> DataOutlook:
    """The data that ``config`` names; reads no text. Raises what a run would raise before reading any."""
    source = check(config, registry)
    size = _size(source)
    found = None if size is not None and size > HASHED else find(source, config, registry)
    if found is None:
        return _unprepared(source, size, config, registry)
    directory, manifest = found
    data = config.data
    empty = SplitRecord(0, 0, 0, None, {})
    train, val = (manifest.splits.get(name, empty) for name in ("train", "val"))
    buckets = _rows(train, data)
    order, total = None, None if data.on_exhaustion == "repeat" else sum(buckets.values())
    if data.curriculum:
        order = _order(buckets, config)
        total = order.total
    return DataOutlook(
        source=_name(source, data),
        directory=directory,
        vocab_size=manifest.vocab_size,
        estimated=False,
        text_bytes=train.bytes,
        train_tokens=train.tokens,
        val_tokens=val.tokens,
        buckets=buckets,
        val_rows=sum(_rows(val, data).values()),
        fingerprints={"dataset": manifest.fingerprint, "tokenizer": manifest.tokenizer},
        total=total,
        order=order,
    )


def _unprepared(source: Source | Shards, size: int | None, config: Config, registry: Registry) -> DataOutlook:
    data = config.data
    tokens = None if size is None else int(size / (1 if data.tokenizer == "bytes" else BYTES_PER_TOKEN))
    val = None if tokens is None else int(tokens * data.val_fraction)
    return DataOutlook(
        source=_name(source, data),
        directory=None,
        vocab_size=_vocab_size(data, registry),
        estimated=True,
        text_bytes=size,
        train_tokens=None if tokens is None or val is None else tokens - val,
        val_tokens=val,
        buckets={},
        val_rows=0 if val is None else val // data.max_length,
        fingerprints=None,
    )


def _order(buckets: Mapping[str, int], config: Config) -> Mixture:
    from gpt_simple.data.mixture import mixture  # it needs numpy, which takes half as long to import as all the rest

    data, seed = config.data, order_seed(config)
    return mixture(buckets, data.curriculum, data.on_exhaustion, max_length=data.max_length, seed=seed)


def _rows(split: SplitRecord, data: DataConfig) -> dict[str, int]:
    """Rows of each bucket; exact for packing ``concat``, a lower bound for ``best_fit``, which leaves some space."""
    return {
        name: sum(-(-shard.tokens // data.max_length) for shard in split.buckets[name])
        for name in sorted(split.buckets)
    }


def _size(source: Source | Shards) -> int | None:
    """Bytes of raw text; None for what is not files."""
    return sum(file.stat().st_size for file in source.files) if isinstance(source, Files) else None


def _vocab_size(data: DataConfig, registry: Registry) -> int | None:
    if data.tokenizer in ("bpe", "bytes"):
        return data.tokenizer_vocab_size if data.tokenizer == "bpe" else BYTE_IDS
    return None if data.tokenizer in registry.names("tokenizer") else load_tokenizer(Path(data.tokenizer)).vocab_size


def _name(source: Source | Shards, data: DataConfig) -> str:
    """``stories``, or what the files are: ``12 files``."""
    if data.source is not None:
        return data.source
    return "token shards" if isinstance(source, Shards) else f"{len(getattr(source, 'files', ()))} files"
