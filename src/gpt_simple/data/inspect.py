"""The content of a dataset directory, for people: counts, lengths, a sample of text. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gpt_simple.data.cache import Log, reading
from gpt_simple.data.manifest import FILE, TOKENIZER, Manifest, datasets_below, read_manifest, verify_checksums
from gpt_simple.data.shards import Shard, open_shard
from gpt_simple.data.sources.shards import TRAIN, NanoGpt
from gpt_simple.data.tokenizer import load_tokenizer
from gpt_simple.errors import DataError

QUANTILES = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


def summary(directory: Path, manifest: Manifest, max_length: int | None = None) -> list[str]:
    """Lines about the manifest: the tokenizer, and each split with its buckets."""
    lines = [
        f"{directory}: tokens of a vocabulary of {manifest.vocab_size:,} ids as {manifest.dtype_name}, "
        f"EOD {manifest.eod_id}, tokenizer {manifest.tokenizer[:12]}"
    ]
    for name, split in manifest.splits.items():
        size = "" if not split.bytes else f", {split.bytes:,} bytes ({split.bytes / max(1, split.tokens):.2f} a token)"
        rows = ""
        if max_length is not None:  # rows under packing concat
            count = sum(-(-shard.tokens // max_length) for shard in split.shards)
            rows = f", {count:,} rows of {max_length:,}"
        lines.append(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens{size}{rows}")
        lines += [
            f"  {bucket}: {sum(s.documents for s in shards):,} documents, {sum(s.tokens for s in shards):,} tokens"
            f" in {len(shards):,} shard{'s' if len(shards) > 1 else ''}"
            for bucket, shards in sorted(split.buckets.items())
        ]
    return lines


def inspect(directory: Path, *, sample_tokens: int, log: Log) -> list[str]:
    """All lines about a dataset. Raises DataError if a file is missing, damaged, or not of this tokenizer."""
    with reading(directory):
        return _inspect(directory, sample_tokens, log)


def _inspect(directory: Path, sample_tokens: int, log: Log) -> list[str]:
    if (directory / TRAIN).is_file() and not (directory / FILE).exists():
        return NanoGpt(directory).describe()
    if directory.is_dir() and not os.path.lexists(directory / FILE) and (below := datasets_below(directory)):
        raise DataError(f"{directory}: there is no {FILE}", hint=below)
    manifest = read_manifest(directory)
    tokenizer = load_tokenizer(directory / TOKENIZER, end=manifest.eod_id)
    if tokenizer.fingerprint != manifest.tokenizer:
        raise DataError(
            f"{directory / TOKENIZER}: its fingerprint is {tokenizer.fingerprint[:12]}, {FILE} says "
            f"{manifest.tokenizer[:12]}",
            hint="the tokens were made with another tokenizer",
        )
    log("comparing all files with their checksums")
    count = len(verify_checksums(directory, manifest, {}))
    lines = [*summary(directory, manifest), f"checksums: all {count} files are as they were written"]
    for name, split in manifest.splits.items():
        shards = [open_shard(directory, record, manifest) for record in split.shards]
        if not shards:
            continue
        for shard in shards:
            shard.check(shard.tokens, int)
        sizes = np.concatenate([np.diff(shard.starts) for shard in shards])
        found = np.quantile(sizes, list(QUANTILES.values()), method="nearest")
        quantiles = ", ".join(f"{word} {int(size):,}" for word, size in zip(QUANTILES, found, strict=True))
        lines.append(f"{name} documents in tokens, EOD included: {quantiles}")
    first = next((shard for split in manifest.splits.values() for shard in split.shards), None)
    if first and sample_tokens:
        ids = _beginning(open_shard(directory, first, manifest), sample_tokens)
        lines += [
            f"the first document begins ({len(ids):,} token{'s' if len(ids) != 1 else ''}):",
            tokenizer.decode(ids),
        ]
    return lines


def _beginning(shard: Shard, count: int) -> list[int]:
    """The beginning of the first document that is more than its EOD."""
    first = int(np.argmax(np.diff(shard.starts) > 1))
    begin, end = shard.starts[first : first + 2].tolist()
    ids: list[int] = shard.tokens[begin : min(end, begin + count)].tolist()
    return ids[:-1] if ids[-1] == shard.eod_id else ids
