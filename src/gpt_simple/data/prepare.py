"""From what ``[data]`` names to a dataset that can be trained on.

Raw text is tokenised once into the cache, under a name made of everything that it depends on: the content of
the documents, the tokenizer, the split. Nothing is written before all documents were read and found good, and
a dataset appears whole or not at all. This module needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from attrs import evolve

from gpt_simple.config.schema import Config, DataConfig
from gpt_simple.data.cache import Log, building, cache_root
from gpt_simple.data.dataset import Dataset, open_dataset
from gpt_simple.data.manifest import FILE, TOKENIZER, VERSION, WORK, Manifest, read_manifest
from gpt_simple.data.nanogpt import TRAIN, NanoGpt
from gpt_simple.data.sources import Source, Stream
from gpt_simple.data.sources.shards import Shards
from gpt_simple.data.stream import Head, refuse_what_needs_an_index, stream_rows
from gpt_simple.data.tokenize import Train, survey, write
from gpt_simple.data.tokenizer import FILE as TOKENIZER_FILE
from gpt_simple.data.tokenizer import Tokenizer, load_tokenizer
from gpt_simple.errors import ConfigError, DataError
from gpt_simple.hooks.components import Registry

__all__ = ["Dataset", "check", "find", "order_seed", "prepare"]


def prepare(config: Config, registry: Registry, *, log: Log | None = None, require_val: bool = True) -> Dataset:
    """The dataset of a configuration, prepared now or before.

    ``require_val``: refuse a val split that is shorter than one row (an evaluation is wanted). Raises
    ConfigError for settings that exclude each other and DataError for anything wrong with the data; then
    nothing was written.
    """
    log = log or (lambda message: None)
    source = check(config, registry)
    data = config.data
    if isinstance(source, Shards):
        nanogpt = source.nanogpt
        directory = source.directory if nanogpt is None else _linked(nanogpt, data, registry, log)
    else:
        raw = Head(source) if isinstance(source, Stream) else source
        directory = _prepared(raw, data, registry, log, require_val)
    manifest = read_manifest(directory)
    tokenizer = _tokenizer_of(directory, manifest, data, registry, raw=not isinstance(source, Shards))
    dataset = open_dataset(directory, tokenizer, manifest, data, log)
    if not dataset.train.targets:
        raise DataError(f"{directory}: the train split is empty; lower data.val_fraction or add text")
    if require_val:
        documents = dataset.val.documents + dataset.train.documents
        _require_val(dataset.val.targets, dataset.val.documents, documents, data, given=isinstance(source, Shards))
    if isinstance(source, Stream):
        return evolve(dataset, stream=stream_rows(source, data, tokenizer))
    dataset.order(data, order_seed(config))
    return dataset


def check(config: Config, registry: Registry) -> Source | Shards:
    """The source of the data, after everything that can be refused without reading the text was refused."""
    data = config.data
    if data.overlap_size and data.packing != "best_fit":
        raise ConfigError(
            'data.overlap_size: only windows of packing "best_fit" overlap; set data.packing = "best_fit" '
            "or leave overlap_size out"
        )
    if data.overlap_size >= data.max_length:
        raise ConfigError(
            f"data.overlap_size: {data.overlap_size} leaves nothing new in a row of {data.max_length} tokens; "
            "expected less than data.max_length"
        )
    source: Source | Shards = registry.get("source", _source_name(data)).build(data, data.seed or 0)
    if isinstance(source, Shards) and source.nanogpt is not None and data.tokenizer == "bpe":
        raise ConfigError(
            f"data.tokenizer: {source.directory} holds nanoGPT's files, which do not say what their ids mean; "
            "expected the path of the tokenizer.json that they were made with (GPT-2's for its openwebtext)"
        )
    if isinstance(source, Stream):
        refuse_what_needs_an_index(data)
    _tokenizer_choice(data, registry)
    return source


def find(source: Source | Shards, config: Config, registry: Registry) -> tuple[Path, Manifest] | None:
    """The dataset of a source if it is there already, after its sizes and its tokenizer were checked.

    Reads what the source's fingerprint depends on, writes nothing. A stream has none.
    """
    if isinstance(source, Stream):
        return None
    if isinstance(source, Shards):
        nanogpt = source.nanogpt
        directory = source.directory if nanogpt is None else _cached(nanogpt.state(), config.data, registry)
    else:
        directory = _cached(source.fingerprint(), config.data, registry)
    if not directory.exists():
        return None
    manifest = read_manifest(directory)
    _tokenizer_of(directory, manifest, config.data, registry, raw=not isinstance(source, Shards))
    return directory, manifest


def order_seed(config: Config) -> int:
    """The seed of the order of samples."""
    return config.training.seed if config.data.seed is None else config.data.seed


def _source_name(data: DataConfig) -> str:
    if data.source is not None:
        return data.source
    is_dataset = isinstance(data.path, str) and any((Path(data.path) / name).exists() for name in (FILE, TRAIN, WORK))
    return "shards" if data.format == "pretokenized" or (data.format is None and is_dataset) else "files"


def _tokenizer_choice(data: DataConfig, registry: Registry) -> tuple[str, Train]:
    """What determines the tokenizer beside the data, and how to make it."""
    name = data.tokenizer
    if name in registry.names("tokenizer"):
        settings = f"{name} {data.tokenizer_vocab_size}" if name != "bytes" else name
        return settings, registry.get("tokenizer", name).build
    path = Path(name)
    if path.exists() or path.suffix or len(path.parts) > 1:
        tokenizer = load_tokenizer(path)
        return tokenizer.fingerprint, lambda config, texts: tokenizer
    raise ConfigError(
        f"data.tokenizer: {name!r} is neither a tokenizer ({', '.join(registry.names('tokenizer'))}) nor a file; "
        "expected one of these or the path of a tokenizer.json"
    )


def _tokenizer_of(directory: Path, manifest: Manifest, data: DataConfig, registry: Registry, *, raw: bool) -> Tokenizer:
    """The tokenizer that a dataset was made with. A dataset brings its own, unless the configuration names a file."""
    own = directory / TOKENIZER
    trained = data.tokenizer in registry.names("tokenizer")
    if (raw or trained) and (own / TOKENIZER_FILE).is_file():
        tokenizer: Tokenizer = load_tokenizer(own, data.tokenizer if raw else None)
    else:
        tokenizer = _tokenizer_choice(data, registry)[1](data, lambda: iter(()))
    if tokenizer.fingerprint != manifest.tokenizer:
        gone = "" if (own / TOKENIZER_FILE).is_file() else f" ({own / TOKENIZER_FILE} is missing: copy it again)"
        raise DataError(
            f"{directory}: its tokens were made with the tokenizer {manifest.tokenizer[:12]}..., not with "
            f"{tokenizer.name} ({tokenizer.fingerprint[:12]}...); use the dataset's own{gone} or prepare the data again"
        )
    return tokenizer


def _cached(fingerprint: str, data: DataConfig, registry: Registry) -> Path:
    """Where documents of this fingerprint are kept once they are prepared as ``data`` says."""
    settings, _ = _tokenizer_choice(data, registry)
    name = json.dumps([VERSION, fingerprint, settings, data.val_fraction, data.max_documents])
    return cache_root() / "datasets" / hashlib.sha256(name.encode()).hexdigest()[:24]


def _linked(source: NanoGpt, data: DataConfig, registry: Registry, log: Log) -> Path:
    """A cached dataset that stands for nanoGPT's files."""
    target = _cached(source.state(), data, registry)
    if not target.exists():
        with building(target, log) as directory:
            if directory is not None:
                log(f"reading {source.directory} once, for counts and checksums")
                source.link(directory, _tokenizer_choice(data, registry)[1](data, lambda: iter(())))
    return target


def _prepared(source: Source, data: DataConfig, registry: Registry, log: Log, require_val: bool) -> Path:
    """The cached dataset of raw documents."""
    _, train = _tokenizer_choice(data, registry)
    fingerprint = source.fingerprint()
    target = _cached(fingerprint, data, registry)
    if target.exists():
        log(f"reusing prepared data {target}")
        return target
    found = survey(source, data)
    if found.empty:
        log(f"skipped {found.empty:,} documents without text")
    if require_val:
        # A token stands for at least a byte: a split that is too short even so is refused before anything is written.
        longest = found.val_bytes + 2 * found.val_documents
        _require_val(longest, found.val_documents, found.documents, data, "at most ")
    with building(target, log) as directory:
        if directory is not None:
            size = f"{found.bytes / 1e6:.1f} MB of text"
            log(f"preparing {found.documents:,} documents, {size}, tokenizer {data.tokenizer}")
            manifest = write(directory, source, data, found, train, fingerprint)
            val = manifest.splits["val"]
            if require_val:
                _require_val(val.tokens, val.documents, found.documents, data)
            log(f"prepared {manifest.splits['train'].tokens + val.tokens:,} tokens in {target}")
    return target


def _require_val(
    tokens: int, documents: int, of_documents: int, data: DataConfig, bound: str = "", *, given: bool = False
) -> None:
    """Refuse a val split without a whole row. ``given``: the dataset brings it, no setting changes what is in it."""
    if tokens < data.max_length:
        share, remedy = ("", "") if given else (f" (data.val_fraction {data.val_fraction:g})", "raise val_fraction, ")
        raise DataError(
            f"the validation split is shorter than one sample: {bound}{tokens:,} tokens in {documents:,} of "
            f"{of_documents:,} documents{share}, and a sample is data.max_length {data.max_length:,}; "
            f"{remedy}lower max_length, give more text, or set training.eval_steps = 0"
        )
