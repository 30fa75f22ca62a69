"""What ``[data]`` names, and where it is. Reads no text, writes nothing, and needs neither torch nor numpy."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from gpt_simple.config.schema import Config, DataConfig
from gpt_simple.data.cache import cache_root, reading
from gpt_simple.data.manifest import FILE, TOKENIZER, VERSION, WORK, Manifest, ShardRecord, read_manifest
from gpt_simple.data.sources import Source, Stream
from gpt_simple.data.sources.shards import TRAIN, NanoGpt, Shards
from gpt_simple.data.tokenizer import BYTE_IDS, Train, load_tokenizer
from gpt_simple.data.tokenizer import FILE as TOKENIZER_FILE
from gpt_simple.errors import ConfigError, DataError
from gpt_simple.hooks.batch import Tokenizer
from gpt_simple.hooks.components import Registry


def check(config: Config, registry: Registry) -> Source | Shards:
    """The source of the data. Raises for everything that can be refused without reading the text."""
    data = config.data
    if data.overlap_size and data.packing != "best_fit":
        raise ConfigError(
            'only windows of packing "best_fit" overlap',
            key="data.overlap_size",
            hint='set data.packing = "best_fit" or leave overlap_size out',
        )
    if data.overlap_size >= data.max_length:
        raise ConfigError(
            f"{data.overlap_size} leaves nothing new in a row of {data.max_length} tokens",
            key="data.overlap_size",
            hint="expected less than data.max_length",
        )
    source: Source | Shards = registry.get("source", _source_name(data)).build(data, data.seed or 0)
    if isinstance(source, NanoGpt) and data.tokenizer == "bpe":
        raise ConfigError(
            f"{source.directory} holds nanoGPT's files, which do not say what their ids mean",
            key="data.tokenizer",
            hint="expected the path of the tokenizer.json that they were made with (GPT-2's for its openwebtext)",
        )
    if isinstance(source, Stream):
        _refuse_what_needs_an_index(data)
    if end_token(data) and data.tokenizer in registry.names("tokenizer") and type(source) is not Shards:
        raise ConfigError(
            f"the tokenizer {data.tokenizer!r} has its own token that ends a document",
            key="data.end_token",
            hint="leave it out: it is for the path of a tokenizer.json",
        )
    tokenizer_choice(data, registry)
    return source


def find(source: Source | Shards, config: Config, registry: Registry) -> tuple[Path, Manifest] | None:
    """The dataset of a source if it exists, after its sizes and its tokenizer were checked. A stream has none.

    Reads what the source's fingerprint depends on.
    """
    if isinstance(source, Stream):
        return None
    if isinstance(source, Shards) and not isinstance(source, NanoGpt):
        directory = source.directory
        return directory, _checked(directory, source, config.data, registry)
    directory = cached(source.fingerprint(), config.data, registry)
    with reading(directory):
        if not directory.exists():
            return None
    try:
        return directory, _checked(directory, source, config.data, registry)
    except DataError:
        return None  # a run prepares the data, or what is damaged of them, again


def _checked(directory: Path, source: Source | Shards, data: DataConfig, registry: Registry) -> Manifest:
    manifest = read_manifest(directory)
    tokenizer_of(directory, manifest, data, registry, raw=not isinstance(source, Shards))
    return manifest


def cached(fingerprint: str, data: DataConfig, registry: Registry) -> Path:
    """Where documents of this fingerprint are kept once they are prepared."""
    settings, _ = tokenizer_choice(data, registry)
    name = json.dumps([VERSION, fingerprint, settings, data.val_fraction, data.max_documents])
    return cache_root() / "datasets" / hashlib.sha256(name.encode()).hexdigest()[:24]


def tokenizer_choice(data: DataConfig, registry: Registry) -> tuple[str, Train]:
    """A text of all that determines the tokenizer beside the documents, and the function that makes it."""
    name = data.tokenizer
    if name in registry.names("tokenizer"):
        settings = f"{name} {data.tokenizer_vocab_size}" if name != "bytes" else name
        return settings, registry.get("tokenizer", name).build
    path = Path(name)
    if path.exists() or path.suffix or len(path.parts) > 1:
        tokenizer = load_tokenizer(path, None, end_token(data))
        return tokenizer.settings, lambda config, texts: tokenizer
    raise ConfigError(
        f"{name!r} is neither a tokenizer ({', '.join(registry.names('tokenizer'))}) nor a file",
        key="data.tokenizer",
        hint="expected one of these or the path of a tokenizer.json",
    )


def tokenizer_of(directory: Path, manifest: Manifest, data: DataConfig, registry: Registry, *, raw: bool) -> Tokenizer:
    """The tokenizer that a dataset was made with. A dataset brings its own, unless the configuration names a file."""
    own = directory / TOKENIZER
    trained = data.tokenizer in registry.names("tokenizer")
    if (raw or trained) and (own / TOKENIZER_FILE).is_file():
        tokenizer: Tokenizer = load_tokenizer(own, data.tokenizer if raw else None, manifest.eod_id)
        named = end_token(data)
        if named is not None and load_tokenizer(own, None, named).eod_id != manifest.eod_id:
            raise DataError(
                f"{directory}: the token that ends its documents is {manifest.eod_id}, not {named!r}",
                key="data.end_token",
                hint="leave it out: a dataset brings its own",
            )
    else:
        tokenizer = tokenizer_choice(data, registry)[1](data, lambda: iter(()))
    if tokenizer.fingerprint != manifest.tokenizer:
        gone = "" if (own / TOKENIZER_FILE).is_file() else f" ({own / TOKENIZER_FILE} is missing: copy it again)"
        raise DataError(
            f"{directory}: its tokens were made with the tokenizer {manifest.tokenizer[:12]}..., not with "
            f"{tokenizer.name} ({tokenizer.fingerprint[:12]}...)",
            hint=f"use the dataset's own{gone} or prepare the data again",
        )
    if data.tokenizer == "bytes" and tokenizer.vocab_size != BYTE_IDS:
        raise DataError(
            f'"bytes" has {BYTE_IDS} ids, but {directory} was made with {own / TOKENIZER_FILE}, '
            f"which has {tokenizer.vocab_size:,}",
            key="data.tokenizer",
            hint="leave data.tokenizer out, or prepare the data again",
        )
    return tokenizer


def end_token(data: DataConfig) -> str | None:
    """The token that ends a document, if the configuration names it. A plugin's class of ``[data]`` may lack it."""
    name: str | None = getattr(data, "end_token", None)
    return name


def index_of(directory: Path, manifest: Manifest) -> Path:
    """Where the index of a dataset is kept: beside it, or in the cache if nothing can be written there."""
    if os.access(directory, os.W_OK):
        return directory / "index"
    return cache_root() / "index" / manifest.fingerprint[:24]


def packing_of(shard: ShardRecord, directory: Path, manifest: Manifest, data: DataConfig) -> tuple[Path, str]:
    """Where the ``best_fit`` packing of a shard is kept, and a text of all that it is made from."""
    name = f"best_fit-{data.max_length}-{data.overlap_size}-{shard.name.replace('/', '-')}"
    made_from = json.dumps([shard.idx.sha256, data.max_length, data.overlap_size])
    return index_of(directory, manifest) / manifest.fingerprint[:16] / name, made_from


def order_seed(config: Config) -> int:
    """The seed of the order of samples."""
    return config.training.seed if config.data.seed is None else config.data.seed


def _source_name(data: DataConfig) -> str:
    if data.source is not None:
        return data.source
    own = (FILE, TRAIN, WORK)
    is_dataset = isinstance(data.path, str) and any(os.path.exists(os.path.join(data.path, name)) for name in own)
    return "shards" if data.format == "pretokenized" or (data.format is None and is_dataset) else "files"


def _refuse_what_needs_an_index(data: DataConfig) -> None:
    """Raise ConfigError for settings that need all documents before the first step."""
    for field, unwanted, instead in (
        ("packing", data.packing == "best_fit", '"concat"'),
        ("on_exhaustion", data.on_exhaustion == "renormalise", '"repeat" or "halt"'),
        ("curriculum", bool(data.curriculum), "no curriculum"),
    ):
        if unwanted:
            raise ConfigError(f"the source {data.source} has no index", key=f"data.{field}", hint=f"expected {instead}")
