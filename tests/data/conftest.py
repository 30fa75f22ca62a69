"""Small data for the tests of this area."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from gpt_simple.config.schema import Config
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.manifest import ALL, FILE, Manifest
from gpt_simple.data.prepare import prepare
from gpt_simple.data.shards import DatasetWriter, Shard, ShardWriter, open_shard
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
        writer = DatasetWriter(directory, byte_tokenizer(Config().data, lambda: iter(())), shard_tokens=shard_tokens)
        for name, buckets in splits.items():
            for bucket, documents in buckets.items():
                for document in documents:
                    tokens, held_out = np.array([*document, 0]), np.array([name == "val"])
                    writer.add(bucket, tokens, np.array([len(tokens)]), np.array([0]), held_out)
        manifest = writer.close("test")
        records = {name: evolve(manifest.splits[name], bytes=None) for name in splits}
        (directory / FILE).write_text(evolve(manifest, splits=records).text)
        return directory

    return make


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[[Documents], Shard]:
    """One shard of these documents, ids below 100, EOD 0."""

    def make(documents: Documents) -> Shard:
        manifest = Manifest("test", 100, 0, "test", {})
        writer = ShardWriter(tmp_path / "shards", ALL, eod_id=0, vocab_size=100)
        for document in documents:
            writer.extend(np.array([*document, 0]), np.array([len(document) + 1]))
        return open_shard(tmp_path / "shards", writer.close()[0], manifest)

    return make
