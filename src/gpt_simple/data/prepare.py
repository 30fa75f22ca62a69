"""From what ``[data]`` names to a dataset that can be trained on.

Raw text is tokenized once into the cache, under a name made of everything that it depends on: the content of the
documents, the tokenizer, the split. Nothing is written before all documents were read and found good, and a dataset
appears whole or not at all. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attrs import evolve

from gpt_simple.config.schema import Config, DataConfig
from gpt_simple.data.cache import Log, build_once
from gpt_simple.data.dataset import Dataset, open_dataset
from gpt_simple.data.locate import cached, check, order_seed, tokenizer_choice, tokenizer_of
from gpt_simple.data.manifest import held_out_note, read_manifest
from gpt_simple.data.sources import Source, Stream
from gpt_simple.data.sources.files import SHOWN, Files, passed_over
from gpt_simple.data.sources.shards import NanoGpt, Shards
from gpt_simple.data.stream import Head, stream_rows
from gpt_simple.data.tokenize import survey, write
from gpt_simple.errors import DataError
from gpt_simple.hooks.components import Registry

Opened = Callable[[Path], Dataset]
"""Opens a dataset directory. Raises DataError for one that is damaged or not of this configuration."""


def prepare(config: Config, registry: Registry, *, log: Log | None = None, require_val: bool = True) -> Dataset:
    """The dataset of a configuration, prepared now or before.

    ``require_val``: refuse a val split that is shorter than one row (an evaluation is wanted). Raises ConfigError for
    settings that exclude each other and DataError for anything wrong with the data; then nothing was written.
    """
    log = log or (lambda message: None)
    source = check(config, registry)
    data = config.data

    def opened(directory: Path) -> Dataset:
        manifest = read_manifest(directory)
        tokenizer = tokenizer_of(directory, manifest, data, registry, raw=not isinstance(source, Shards))
        return open_dataset(directory, tokenizer, manifest, data, log)

    if isinstance(source, NanoGpt):
        dataset = _linked(source, data, registry, log, opened)
    elif isinstance(source, Shards):
        dataset = opened(source.directory)
    else:
        documents = Head(source) if isinstance(source, Stream) else source
        dataset = _prepared(documents, data, registry, log, require_val, opened)
    dataset = evolve(dataset, weights=getattr(source, "weights", None))
    train, val = dataset.train, dataset.val
    count = train.documents + val.documents
    if not isinstance(source, Shards) and data.val_fraction:
        tokens = train.targets + val.targets
        log(held_out_note(val.documents, count, val.targets, tokens, data.val_fraction, "data.val_fraction"))
    if not dataset.train.targets:
        raise DataError(f"{dataset.directory}: the train split is empty", hint="lower data.val_fraction or add text")
    if require_val:
        _require_val(val.targets, val.documents, count, data, prepared=isinstance(source, Shards))
    if isinstance(source, Stream):
        return evolve(dataset, stream=stream_rows(source, data, dataset.tokenizer))
    dataset.order(data, order_seed(config))  # raises for a curriculum that the buckets do not allow
    return dataset


def _linked(source: NanoGpt, data: DataConfig, registry: Registry, log: Log, opened: Opened) -> Dataset:
    """A cached dataset that stands for nanoGPT's files."""

    def fill(directory: Path) -> None:
        log(f"reading {source.directory} once, for counts and checksums")
        source.link(directory, tokenizer_choice(data, registry)[1](data, lambda: iter(())))

    target = cached(source.fingerprint(), data, registry)
    return build_once(target, fill, log, lambda: opened(target))


def _prepared(
    source: Source, data: DataConfig, registry: Registry, log: Log, require_val: bool, opened: Opened
) -> Dataset:
    """The cached dataset of raw documents."""
    if isinstance(source, Files) and (others := passed_over(source.roots, json_lines=source.json_lines)):
        log(others)
    fingerprint = source.fingerprint()
    target = cached(fingerprint, data, registry)
    if target.exists():
        with suppress(DataError):
            dataset = opened(target)
            log(f"reusing prepared data {target}")
            return dataset
    found = survey(source, data)
    if isinstance(source, Files) and source.skipped:
        for place in list(source.skipped)[:SHOWN]:
            log(f"skipped {place}")
        log(f"skipped {len(source.skipped):,} documents that cannot be read")
    if found.empty:
        log(f"skipped {found.empty:,} documents without text")
    if require_val:
        # A token stands for at least a byte: a split that is too short even so is refused before anything is written.
        longest = found.val_bytes + 2 * found.val_documents
        _require_val(longest, found.val_documents, found.documents, data, "at most ")

    def fill(directory: Path) -> None:
        size = f"{found.bytes / 1e6:.1f} MB of text"
        log(f"preparing {found.documents:,} documents, {size}, tokenizer {data.tokenizer}")
        train_tokenizer = tokenizer_choice(data, registry)[1]
        splits = write(directory, source, data, found, train_tokenizer, fingerprint).splits
        val = splits["val"]
        if require_val:
            _require_val(val.tokens, val.documents, found.documents, data)
        log(f"prepared {splits['train'].tokens + val.tokens:,} tokens in {target}")

    return build_once(target, fill, log, lambda: opened(target))


def _require_val(
    tokens: int, documents: int, of_documents: int, data: DataConfig, bound: str = "", *, prepared: bool = False
) -> None:
    """Refuse a val split without a whole row. ``prepared``: the dataset brings it, no setting changes its content."""
    if tokens < data.max_length:
        share, remedy = (
            ("", "") if prepared else (f" (data.val_fraction {data.val_fraction:g})", "raise val_fraction, ")
        )
        raise DataError(
            f"the validation split is shorter than one sample: {bound}{tokens:,} tokens in {documents:,} of "
            f"{of_documents:,} documents{share}, and a sample is data.max_length {data.max_length:,}",
            hint=f"{remedy}lower max_length, give more text, or set training.eval_steps = 0",
        )
