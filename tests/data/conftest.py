"""Small data for the tests of this area."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from gpt_simple.config.schema import Config
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.manifest import ALL, FILE, TOKENIZER, Manifest, SplitRecord
from gpt_simple.data.prepare import prepare
from gpt_simple.data.shards import Shard, ShardWriter, open_shard
from gpt_simple.data.tokenizer import bytes as byte_tokenizer
from gpt_simple.hooks.components import builtin_registry

Documents = Iterable[list[int]]


@pytest.fixture
def config() -> Callable[..., Config]:
    """``config(path=..., B=2)``: a configuration from fields of ``[data]`` and a few of ``[training]``."""

    def make(*, B: int = 2, A: int = 1, training_seed: int = 1, **data: Any) -> Config:
        config = Config()
        data = {"tokenizer": "bytes", "max_length": 8, "num_workers": 0} | data
        training = evolve(
            config.training, per_device_batch_size=B, gradient_accumulation_steps=A, seed=training_seed, eval_steps=1
        )
        return evolve(config, data=evolve(config.data, **data), training=training)

    return make


@pytest.fixture
def stories(config: Callable[..., Config]) -> Callable[..., Dataset]:
    """Prepared stories; the cache of the session is used."""

    def make(**data: Any) -> Dataset:
        return prepare(config(source="stories", max_documents=60, **data), builtin_registry())

    return make


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write token shards: ``write_dataset(train={"wiki": [[5, 6], [7]]}, val={...})`` in byte tokens."""

    def make(shard_tokens: int = 1 << 20, **splits: dict[str, Documents]) -> Path:
        directory = tmp_path / "dataset"
        tokenizer = byte_tokenizer(Config().data, lambda: iter(()))
        manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, "test", {})
        records = {}
        for name, buckets in splits.items():
            shards = {}
            for bucket, documents in buckets.items():
                vocabulary, eod = manifest.vocab_size, manifest.eod_id
                prefix = f"{name}/{bucket}"
                writer = ShardWriter(directory, prefix, manifest.dtype, eod, vocabulary, shard_tokens)
                for document in documents:
                    writer.add(document)
                shards[bucket] = writer.close()
            count = sum(shard.documents for each in shards.values() for shard in each)
            tokens = sum(shard.tokens for each in shards.values() for shard in each)
            records[name] = SplitRecord(count, tokens, None, None, shards)
        tokenizer.save(directory / TOKENIZER)
        (directory / FILE).write_text(evolve(manifest, splits=records).text)
        return directory

    return make


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[[Documents], Shard]:
    """One shard of these documents, ids below 100, EOD 0."""

    def make(documents: Documents) -> Shard:
        manifest = Manifest("test", 100, 0, "test", {})
        writer = ShardWriter(tmp_path / "shards", ALL, manifest.dtype, 0, 100)
        for document in documents:
            writer.add(document)
        return open_shard(tmp_path / "shards", writer.close()[0], manifest)

    return make
