"""The manifest of a dataset directory: its content, with counts and checksums.

::

    DATA/dataset.json                        the manifest, written last
    DATA/tokenizer/tokenizer.json            what the ids mean
    DATA/{train,val}/BUCKET/shard-00000.bin  tokens (see shards.py)
    DATA/{train,val}/BUCKET/shard-00000.idx  where documents start
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

import attrs
from attrs import frozen

from gpt_simple._documents import parse
from gpt_simple._files import holders_below
from gpt_simple.config.convert import convert
from gpt_simple.data.cache import reading
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Tokenizer

FILE = "dataset.json"
TOKENIZER = "tokenizer"
WORK = ".work"
"""What `gpt-simple tokenize` has done so far, until there is a manifest."""

REPORT = "tokenize.json"
"""What `gpt-simple tokenize` has left out of a dataset."""

NANOGPT = "nanoGPT"
"""``source`` of a dataset that stands for nanoGPT's files."""

FORMAT = "gpt-simple dataset"
VERSION = 1
ALL = "all"
"""The bucket of data that have only one."""

Dtype = Literal["<u2", "<u4"]


@frozen
class FileRecord:
    """A file's size in bytes and the sha256 (hex) of its content."""

    size: int
    sha256: str


@frozen
class ShardRecord:
    """A shard: its path relative to the dataset, without suffix, and its two files."""

    name: str
    documents: int
    tokens: int
    bin: FileRecord
    idx: FileRecord


@frozen
class SplitRecord:
    """Totals of a split, and the shards of each bucket.

    ``tokens`` counts targets: the tokens of all documents and one EOD each. ``bytes`` is the size of the text
    in UTF-8, ``nats`` minus its log-probability under the source; both are None where unknown.
    """

    documents: int
    tokens: int
    bytes: int | None
    nats: float | None
    buckets: Mapping[str, tuple[ShardRecord, ...]]

    @property
    def shards(self) -> list[ShardRecord]:
        """The shards of all buckets."""
        return [shard for shards in self.buckets.values() for shard in shards]


@frozen
class Manifest:
    """``dataset.json``; ``tokenizer`` and ``source`` are fingerprints of what the tokens were made with and from."""

    tokenizer: str
    vocab_size: int
    eod_id: int
    source: str
    splits: Mapping[str, SplitRecord]

    @property
    def dtype(self) -> Dtype:
        """How a token is stored, as numpy writes it."""
        return token_dtype(self.vocab_size)

    @property
    def dtype_name(self) -> str:
        """``uint16`` or ``uint32``; little-endian."""
        return "uint16" if self.dtype == "<u2" else "uint32"

    @cached_property
    def text(self) -> str:
        """The content of ``dataset.json``."""
        head = {"format": FORMAT, "version": VERSION, "dtype": self.dtype_name}
        return json.dumps(head | attrs.asdict(self), indent=1) + "\n"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the manifest, and through its checksums of all tokens."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def files(self) -> Iterator[tuple[str, FileRecord]]:
        """Every file of the shards: its path relative to the dataset, and its record."""
        for split in self.splits.values():
            for shard in split.shards:
                yield f"{shard.name}.bin", shard.bin
                yield f"{shard.name}.idx", shard.idx


def held_out_note(
    val_documents: int, documents: int, val_tokens: int, tokens: int, val_fraction: float, option: str
) -> str:
    """How much is held out, and what to do if that is far more than was asked for. ``option``: val_fraction's name."""
    note = f"held out {val_documents:,} of {documents:,} documents, {val_tokens / max(1, tokens):.1%} of the tokens"
    if not holds_out_too_much(val_tokens, tokens, val_fraction):
        return note
    return (
        f"{note}, though {option} is {val_fraction:g}: a document is held out as a whole, and at least one is. Divide"
        " the text into more documents, join it to one file (of a single document the end is held out), or set"
        f" {option} = 0 and evaluate nothing"
    )


def holds_out_too_much(val_tokens: int, tokens: int, val_fraction: float) -> bool:
    """Whether more than twice the share ``val_fraction`` is held out."""
    return val_tokens > 2 * val_fraction * tokens > 0


def token_dtype(vocab_size: int) -> Dtype:
    """The smaller of uint16 and uint32, little-endian, that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_manifest(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Finish a dataset directory that holds its shards: the manifest is written last."""
    tokenizer.save(directory / TOKENIZER)
    (directory / FILE).write_text(manifest.text, encoding="utf-8")


def unfinished(directory: Path) -> DataError:
    """The error of a directory that holds ``WORK`` and no manifest."""
    return DataError(f"{directory}: is not finished", hint="run the `gpt-simple tokenize` that began it again")


def datasets_below(directory: Path) -> str:
    """A hint with the data sets in directories below one that holds none; empty without any."""
    return holders_below(directory, "data sets", FILE)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a dataset directory, after checking that every file is there with its size."""
    file = directory / FILE
    try:
        record = parse(file.read_bytes())
    except OSError as error:
        if os.path.isdir(directory / WORK):
            raise unfinished(directory) from error
        raise DataError(f"{directory}: not a dataset directory, {FILE} cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error})", hint=f"delete {directory} and prepare the data again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f'{file}: expected "format": "{FORMAT}"', hint="this is not a manifest of token shards")
    if record.get("version") != VERSION:
        raise DataError(
            f"{file}: version {record.get('version')} of the format, this program reads {VERSION}",
            hint="prepare the data again",
        )
    manifest: Manifest
    manifest, errors = convert(Manifest, {field.name: record.get(field.name) for field in attrs.fields(Manifest)})
    if errors:
        wrong = "; ".join(f"{path}: {error}" for path, error in errors[:3])
        raise _damaged(directory, f"{file}: damaged ({wrong})")
    for name, split in manifest.splits.items():
        for total in ("documents", "tokens"):
            expected = getattr(split, total)
            found = sum(getattr(shard, total) for shard in split.shards)
            if expected != found:
                where = f"splits.{name}.{total}"
                raise _damaged(directory, f"{file}: damaged ({where} is {expected:,}, but its shards have {found:,})")
    if record.get("dtype") != manifest.dtype_name:
        raise DataError(
            f"{file}: dtype {record.get('dtype')}, but {manifest.vocab_size} ids are stored as {manifest.dtype_name}"
        )
    for name, known in manifest.files():
        path = directory / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise _damaged(directory, f"{file}: damaged (the shard {name} is not inside the directory)")
        with reading(path):
            size = path.stat().st_size if path.is_file() else None
        if size != known.size:
            state = "is missing" if size is None else f"has {size} bytes"
            raise _damaged(directory, f"{path}: {state}, {FILE} says {known.size}")
    return manifest


def verify_checksums(directory: Path, manifest: Manifest, seen: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Compare each file's content with the manifest; return (size, mtime in ns) of all for the next call.

    Files that are as ``seen`` (what an earlier call returned) are not read again.
    """
    now = file_states(directory, manifest)
    for name, expected in manifest.files():
        path = directory / name
        if seen.get(name) != now[name] and (found := content(path)) != expected.sha256:
            raise _damaged(
                directory,
                f"{path}: its content is not what was prepared (sha256 {found[:12]}..., {FILE} says "
                f"{expected.sha256[:12]}...)",
            )
    return now


def file_states(directory: Path, manifest: Manifest) -> dict[str, list[int]]:
    """(size, mtime in ns) of every file of the shards."""
    stats = {name: (directory / name).stat() for name, _ in manifest.files()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def content(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(directory: Path, message: str) -> DataError:
    return DataError(message, hint=f"copy it again, or delete {directory} and prepare the data again")
