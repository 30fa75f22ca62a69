"""The data of a run, from manifests and directory listings: what is there and how far it reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from gpt_simple._names import PROGRAM
from gpt_simple.config.schema import Config, DataConfig
from gpt_simple.data.locate import check, end_token, find, order_seed, packing_of
from gpt_simple.data.manifest import ALL, Manifest, ShardRecord, SplitRecord
from gpt_simple.data.sources import Source
from gpt_simple.data.sources.files import Files, holds_json_lines, passed_over
from gpt_simple.data.sources.shards import Shards
from gpt_simple.data.tokenizer import BYTE_IDS, load_tokenizer
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.components import BUILTIN, Registry
from gpt_simple.hooks.preflight import InspectedData

if TYPE_CHECKING:
    from gpt_simple.data.mixture import Mixture

HASHED = 64 * 2**20
"""Raw files up to this many bytes are hashed to find out whether they were prepared before, and all of their documents
are checked if not (at most 0.2 s)."""

SAMPLED = 100
"""Lines of JSON that are read, to find mistakes in them and the share of text."""

COMPRESSED = (".gz", ".zst")
COMPRESSION = 3
"""Bytes of text in a byte of a compressed file."""

LONGEST_TOKEN = 4.5
"""Bytes of English or code for each token of a large vocabulary."""


def inspect_data(config: Config, registry: Registry) -> InspectedData:
    """The data that ``config`` names; of much text it reads no more than a few lines. Raises what a run would raise."""
    source = check(config, registry)
    size = _size(source)
    found = None if size is not None and size > HASHED else find(source, config, registry)
    if found is None:
        if isinstance(source, Files) and ((size or 0) <= HASHED or (source.lost and not source.skip)):
            for _ in islice(source.documents(), config.data.max_documents):
                pass
        return _unprepared(source, size, config.data, registry)
    return _prepared(source, *found, config)


def refuse_bad_data(config: Config, registry: Registry) -> None:
    """Raise what a run raises for data that are read without a plugin, before it loads torch."""
    source = config.data.source
    if source is None or registry.get("source", source).owner == BUILTIN:
        inspect_data(config, registry)


def _prepared(source: Source | Shards, directory: Path, manifest: Manifest, config: Config) -> InspectedData:
    data = config.data
    empty = SplitRecord(0, 0, 0, None, {})
    train, val = (manifest.splits.get(name, empty) for name in ("train", "val"))

    packed: dict[ShardRecord, int | None] = {}
    if data.packing == "best_fit":
        from gpt_simple.data.packing import packed_rows  # it imports numpy

        records = [*train.shards, *val.shards]
        packed = {shard: packed_rows(*packing_of(shard, directory, manifest, data)) for shard in records}

    def rows(split: SplitRecord) -> dict[str, int]:
        """At least so many where ``best_fit``, which leaves some space, was not done yet."""
        return {
            name: sum(packed.get(shard) or -(-shard.tokens // data.max_length) for shard in bucket)
            for name, bucket in sorted(split.buckets.items())
        }

    buckets = rows(train)
    order = _order(buckets, config)
    rows_once = None if data.on_exhaustion == "repeat" else sum(buckets.values())
    return InspectedData(
        source=_name(source, data),
        directory=directory,
        vocab_size=manifest.vocab_size,
        estimated=False,
        text_bytes=train.bytes,
        train_tokens=train.tokens,
        val_tokens=val.tokens,
        buckets=buckets,
        val_rows=sum(rows(val).values()),
        val_at_most=val.tokens,
        fingerprints={"dataset": manifest.fingerprint, "tokenizer": manifest.tokenizer},
        total=rows_once if order is None else order.total,
        rows_taken=None if order is None else lambda samples: dict(zip(buckets, order.taken(samples), strict=True)),
        unpacked=any(packed[shard] is None for shard in train.shards if packed),
    )


def _unprepared(source: Source | Shards, size: int | None, data: DataConfig, registry: Registry) -> InspectedData:
    vocab_size = _vocab_size(data, registry)
    _refuse_other_buckets(data)
    train = val = rows = None
    if size is not None:
        tokens = int(size * _text_share(source, data) / _bytes_per_token(vocab_size))
        val = int(tokens * data.val_fraction)
        if val and isinstance(source, Files) and not _json_lines(source) and len(source.files) > 1:
            val = max(val, tokens // len(source.files))  # a document is held out as a whole, and at least one is
        train = tokens - val
        rows = train // data.max_length
    val_at_most = _at_most(source, size)
    if data.val_fraction == 0 and not isinstance(source, Shards):
        val = val_at_most = 0
    return InspectedData(
        source=_name(source, data),
        directory=None,
        vocab_size=vocab_size,
        estimated=True,
        text_bytes=size,
        train_tokens=train,
        val_tokens=val,
        buckets={},
        val_rows=(val or 0) // data.max_length,
        fingerprints=None,
        val_at_most=val_at_most,
        total=None if data.on_exhaustion == "repeat" else rows,
    )


def _refuse_other_buckets(data: DataConfig) -> None:
    """The start of a run prepares one bucket, whatever directories its files are in."""
    for number, phase in enumerate(data.curriculum, 1):
        if others := [name for name in phase.mix if name != ALL]:
            raise ConfigError(
                f"phase {number}: there is no bucket {others[0]!r}",
                key="data.curriculum",
                hint=f"data that a run prepares are one, {ALL!r}: make buckets of sub-directories with"
                f" `{PROGRAM} tokenize`",
            )


def _text_share(source: Source | Shards, data: DataConfig) -> float:
    """Bytes of text in a byte of the files, by the first lines. Raises DataError for lines that a run refuses."""
    if not isinstance(source, Files):
        return 1.0
    file = next(iter(_json_lines(source)), None)
    if file is None:
        return 1.0
    most = min(SAMPLED, data.max_documents or SAMPLED)
    text = sum(len(document.text.encode()) for document in islice(evolve(source, files=(file,)).documents(), most))
    if file.suffix in COMPRESSED:
        return COMPRESSION
    with file.open("rb") as stream:
        size = sum(len(line) for line in islice((line for line in stream if line.strip()), most))
    return text / max(1, size)


def _json_lines(source: Files) -> list[Path]:
    """The files of a source that hold one document per line."""
    as_json = source.json_lines
    return [file for file in source.files if (holds_json_lines(file) if as_json is None else as_json)]


def _bytes_per_token(vocab_size: int | None) -> float:
    """1 for bytes, and more with each doubling of the vocabulary, as measured on English and Python."""
    return min(LONGEST_TOKEN, 1 + 0.8 * math.log2(max(1, (vocab_size or 8192) / 257)))


def _at_most(source: Source | Shards, size: int | None) -> int | None:
    """The most targets: a token stands for at least a byte, and each document has one more. None if unbounded."""
    if not isinstance(source, Files) or size is None or any(file.suffix in COMPRESSED for file in source.files):
        return None
    return size + len(source.files)


def _order(buckets: Mapping[str, int], config: Config) -> Mixture | None:
    """The order of samples over the buckets; None without a curriculum."""
    if not config.data.curriculum:
        return None
    from gpt_simple.data.mixture import mixture  # it imports numpy, which takes half as long as all the rest

    data, seed = config.data, order_seed(config)
    return mixture(buckets, data.curriculum, data.on_exhaustion, max_length=data.max_length, seed=seed)


def _size(source: Source | Shards) -> int | None:
    """Bytes of raw text; None for what is not files."""
    return sum(file.stat().st_size for file in source.files) if isinstance(source, Files) else None


def _vocab_size(data: DataConfig, registry: Registry) -> int | None:
    if data.tokenizer in ("bpe", "bytes"):
        return data.tokenizer_vocab_size if data.tokenizer == "bpe" else BYTE_IDS
    if data.tokenizer in registry.names("tokenizer"):
        return None
    return load_tokenizer(Path(data.tokenizer), end=end_token(data)).vocab_size


def _name(source: Source | Shards, data: DataConfig) -> str:
    """``stories``, or what the files are: ``12 files``."""
    if data.source is not None:
        return data.source
    if isinstance(source, Shards):
        return "token shards"
    if not isinstance(source, Files):
        return "0 files"
    skipped = f"skipped {len(source.skipped):,} documents that cannot be read" if source.skipped else ""
    notes = "; ".join(filter(None, [skipped, passed_over(source.roots, json_lines=source.json_lines)]))
    return f"{len(source.files)} files{notes and f' ({notes})'}"
