"""Tokens that were prepared before, used where they are: a dataset directory, or nanoGPT's files.

nanoGPT's ``train.bin`` and ``val.bin`` hold uint16 ids one after another and nothing else. What a dataset directory
needs beside them - where documents end, counts, checksums - is found in one reading and kept in the cache, with links
in place of shards. A file has no EOD before its first token, so that token is no target.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.cache import reading
from gpt_simple.data.manifest import (
    ALL,
    FILE,
    NANOGPT,
    VERSION,
    WORK,
    FileRecord,
    Manifest,
    ShardRecord,
    SplitRecord,
    datasets_below,
    token_dtype,
    unfinished,
    write_manifest,
)
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAIN, VAL = "train.bin", "val.bin"

BLOCK = 1 << 24
"""Tokens that are read at once."""


@frozen
class Shards:
    """A dataset directory."""

    directory: Path


def build(config: DataConfig, seed: int) -> Shards:
    """The directory that ``data.path`` names: a dataset, or nanoGPT's files."""
    if not isinstance(config.path, str) or not config.path:
        raise DataError("expected one directory of token shards (with a dataset.json)", key="data.path")
    directory = Path(config.path)
    if (directory / FILE).is_file():
        return Shards(directory)
    if (directory / TRAIN).is_file():
        return NanoGpt(directory)
    if (directory / WORK).is_dir():
        raise unfinished(directory)
    raise DataError(
        f"{directory}: there is no {FILE} (or {TRAIN} of nanoGPT)",
        key="data.path",
        hint=datasets_below(directory) or "expected a directory of token shards, or data.format = 'text' or 'jsonl'",
    )


@frozen
class NanoGpt(Shards):
    """A directory with a ``train.bin`` and perhaps a ``val.bin``."""

    def fingerprint(self) -> str:
        """Where the files are, their sizes and times: changes when they do."""
        stats = {file.name: file.stat() for file in self._files()}
        known = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        return json.dumps([VERSION, str(self.directory.resolve()), known], sort_keys=True)

    def link(self, target: Path, tokenizer: Tokenizer) -> None:
        """Fill a directory with a manifest, an index and links to the files."""
        if token_dtype(tokenizer.vocab_size) != "<u2":
            raise DataError(
                f"{self.directory / TRAIN}: holds uint16 ids, and the tokenizer {tokenizer.name} has "
                f"{tokenizer.vocab_size:,}",
                hint="name the one that it was made with (data.tokenizer)",
            )
        splits = {file.stem: _link(file, target, tokenizer) for file in self._files()}
        manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, NANOGPT, splits)
        write_manifest(target, manifest, tokenizer)

    def describe(self) -> list[str]:
        """Lines about the files, for people. Raises DataError for one that was cut off."""
        lines = [f"{self.directory}: nanoGPT's files of uint16 ids; data.tokenizer must say what they mean"]
        for file in self._files():
            tokens = _tokens(file)
            lines.append(f"{file.name}: {len(tokens):,} tokens, the largest id is {int(tokens.max()):,}")
        return lines

    def _files(self) -> list[Path]:
        return [file for name in (TRAIN, VAL) if (file := self.directory / name).is_file()]


def _tokens(file: Path) -> NDArray[np.uint16]:
    import numpy as np  # finding a directory needs no numpy

    size = file.stat().st_size
    if size % 2 or size < 4:
        raise DataError(
            f"{file}: {size:,} bytes are not a list of uint16 ids", hint="the file was cut off, copy it again"
        )
    with reading(file):
        return np.asarray(np.memmap(file, "<u2", "r"))


def _link(file: Path, target: Path, tokenizer: Tokenizer) -> SplitRecord:
    import numpy as np

    from gpt_simple.data.shards import write_index

    tokens = _tokens(file)
    digest, counts, ends = hashlib.sha256(), np.zeros(tokenizer.vocab_size, np.int64), []
    for begin in range(0, len(tokens), BLOCK):
        block = tokens[begin : begin + BLOCK]
        at = int(block.argmax())
        if block[at] >= tokenizer.vocab_size:
            raise DataError(
                f"{file}: token {int(block[at])} at position {begin + at} is beyond the {tokenizer.vocab_size:,} ids "
                f"of the tokenizer {tokenizer.name}",
                hint="name the one that it was made with (data.tokenizer)",
            )
        digest.update(block.data)
        counts += np.bincount(block, minlength=tokenizer.vocab_size)
        ends.append(np.flatnonzero(block == tokenizer.eod_id) + begin + 1)
    counts[tokens[0]] -= 1
    starts = np.unique(np.concatenate([[1], *ends, [len(tokens)]]))
    name = f"{file.stem}/{ALL}/shard-00000"
    path = target / f"{name}.bin"
    path.parent.mkdir(parents=True)
    path.symlink_to(file.resolve())
    index = write_index(path.with_suffix(".idx"), starts)
    documents, targets = len(starts) - 1, len(tokens) - 1
    shard = ShardRecord(name, documents, targets, FileRecord(tokens.nbytes, digest.hexdigest()), index)
    return SplitRecord(documents, targets, int(counts @ tokenizer.token_bytes()), None, {ALL: (shard,)})
