"""The dataset directory: written, read, and refused when it is not what the manifest says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_simple.config.schema import Config
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.inspect import inspect
from gpt_simple.data.manifest import Manifest, read_manifest
from gpt_simple.data.prepare import prepare
from gpt_simple.data.shards import ShardWriter, open_shard
from gpt_simple.data.tokenizer import bpe
from gpt_simple.errors import DataError
from gpt_simple.hooks.components import builtin_registry

MakeConfig = Callable[..., Config]
WriteDataset = Callable[..., Path]

TRAIN = {"code": [[9] * 5, [8] * 3], "wiki": [[7] * 20, [6, 5]]}
VAL = {"all": [[4] * 11]}


@pytest.fixture
def directory(write_dataset: WriteDataset) -> Path:
    return write_dataset(train=TRAIN, val=VAL)


@pytest.fixture
def opened(config: MakeConfig) -> Callable[..., Dataset]:
    return lambda directory, **data: prepare(config(path=str(directory), **data), builtin_registry())


def test_buckets_are_numbered_in_sorted_order(directory: Path, opened: Callable[..., Dataset]) -> None:
    dataset = opened(directory)
    assert dict(dataset.train.buckets) == {"code": 2, "wiki": 3}
    assert (dataset.train.targets, dataset.val.targets) == (34, 12)
    assert dataset.floor is None


def test_documents_of_many_shards_are_all_targets_once(
    write_dataset: WriteDataset, opened: Callable[..., Dataset]
) -> None:
    documents = [[1 + i % 200] * (1 + i % 9) for i in range(60)]
    directory = write_dataset(shard_tokens=50, train={"all": documents}, val=VAL)
    split = opened(directory).train
    assert len(list((directory / "train/all").glob("*.bin"))) > 4
    inputs, labels = np.empty((2, split.rows, 8), np.int64)
    split.read(np.arange(split.rows), inputs, labels, None)
    assert labels[labels != -100].tolist() == [token for each in documents for token in (*each, 0)]
    assert split.targets_of(np.arange(split.rows)).tolist() == (labels != -100).sum(1).tolist()


def test_big_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    manifest = Manifest("test", 70_000, 0, "test", {})
    writer = ShardWriter(tmp_path, "all", eod_id=0, vocab_size=70_000)
    writer.extend(np.array([69_999, 1, 0]), np.array([3]))
    shard = open_shard(tmp_path, writer.close()[0], manifest)
    assert shard.tokens.tolist() == [0, 69_999, 1, 0]
    assert shard.tokens.dtype == np.uint32


@pytest.mark.parametrize("token", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused_when_writing(token: int, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "all", eod_id=0, vocab_size=257)
    with pytest.raises(DataError, match="outside its vocabulary of 257"):
        writer.extend(np.array([1, token, 0]), np.array([3]))


def test_a_flipped_bit_is_found_at_the_first_use(directory: Path, opened: Callable[..., Dataset]) -> None:
    file = directory / "train/wiki/shard-00000.bin"
    data = bytearray(file.read_bytes())
    data[6] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train/wiki/shard-00000\.bin: its content is not what was prepared"):
        opened(directory)


def test_a_file_that_changed_is_verified_again(directory: Path, opened: Callable[..., Dataset]) -> None:
    opened(directory)
    file = directory / "val/all/shard-00000.bin"
    data = bytearray(file.read_bytes())
    data[6] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"val/all/shard-00000\.bin: its content"):
        opened(directory)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_truncated_or_missing_shard_is_named(suffix: str, directory: Path, opened: Callable[..., Dataset]) -> None:
    file = directory / f"train/code/shard-00000.{suffix}"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 2)
    expected = rf"shard-00000\.{suffix}: has {size - 2} bytes, dataset\.json says {size}"
    with pytest.raises(DataError, match=expected):
        opened(directory)
    file.unlink()
    with pytest.raises(DataError, match=rf"shard-00000\.{suffix}: is missing"):
        opened(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a manifest of token shards"),
        ({"version": 2}, "version 2 of the format, this program reads 1"),
        ({"dtype": "uint32"}, "dtype uint32, but 257 ids are stored as uint16"),
        ({"splits": None}, r"damaged \(splits: expected a table of tables, got null\)"),
        ({"vocab_size": None}, r"damaged \(vocab_size: expected an integer, got null\)"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(change: dict[str, object], message: str, directory: Path) -> None:
    file = directory / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        read_manifest(directory)


@pytest.mark.parametrize("name", ["../outside", "train/../../outside", "/outside"])
def test_a_shard_outside_its_dataset_is_not_opened(directory: Path, name: str) -> None:
    outside = directory.parent / "outside"
    name = name.replace("/outside", str(outside)) if name.startswith("/") else name
    for suffix in (".bin", ".idx"):
        (directory / f"train/code/shard-00000{suffix}").rename(outside.with_suffix(suffix))
    file = directory / "dataset.json"
    file.write_text(file.read_text().replace("train/code/shard-00000", name))
    with pytest.raises(DataError, match=rf"the shard {name}\.bin is not inside the directory"):
        read_manifest(directory)


def test_totals_that_are_not_those_of_the_shards_are_refused(directory: Path) -> None:
    file = directory / "dataset.json"
    file.write_text(file.read_text().replace('"tokens": 34,', '"tokens": 43,', 1))
    with pytest.raises(DataError, match=r"damaged \(splits\.train\.tokens is 43, but its shards have 34\)"):
        read_manifest(directory)


def test_inspect_shows_the_first_document_that_has_text(write_dataset: WriteDataset) -> None:
    directory = write_dataset(train={"all": [[], [40], [7] * 9]}, val=VAL)
    *_, heading, text = inspect(directory, sample_tokens=5, log=print)
    assert (heading, len(text)) == ("the first document begins (1 token):", 1)


def test_a_manifest_that_is_cut_off_is_refused(directory: Path) -> None:
    file = directory / "dataset.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(DataError, match=r"dataset\.json: not JSON"):
        read_manifest(directory)


def test_a_tokenizer_that_does_not_match_is_refused(
    directory: Path, opened: Callable[..., Dataset], tmp_path: Path
) -> None:
    other = bpe(Config().data, lambda: iter(["some other text, some other merges"]))
    other.save(tmp_path / "other")
    with pytest.raises(DataError, match=r"were made with the tokenizer .*, not with .*other"):
        opened(directory, tokenizer=str(tmp_path / "other"))
    other.save(directory / "tokenizer")
    with pytest.raises(DataError, match="were made with the tokenizer"):
        opened(directory)


def test_a_tokenizer_that_is_gone_is_named(directory: Path, opened: Callable[..., Dataset]) -> None:
    manifest = directory / "dataset.json"
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(record | {"tokenizer": "0" * 64}))
    (directory / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"tokenizer/tokenizer\.json is missing: copy it again"):
        opened(directory)


def test_a_dataset_without_val_trains_without_evaluation(write_dataset: WriteDataset, config: MakeConfig) -> None:
    settings = config(path=str(write_dataset(train=TRAIN)))
    assert prepare(settings, builtin_registry(), require_val=False).val.rows == 0
    with pytest.raises(
        DataError, match="validation split is shorter than one sample: 0 tokens in 0 of 4 documents, and"
    ):
        prepare(settings, builtin_registry())


def test_a_packing_is_computed_once(
    directory: Path, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(dataset: Dataset) -> list[list[int]]:
        inputs, labels = np.empty((2, dataset.train.rows, 8), np.int64)
        dataset.train.read(np.arange(dataset.train.rows), inputs, labels, None)
        return labels.tolist()

    first = rows(opened(directory, packing="best_fit", overlap_size=2))
    monkeypatch.setattr("gpt_simple.data.dataset.best_fit", None)
    assert rows(opened(directory, packing="best_fit", overlap_size=2)) == first
    with pytest.raises(TypeError):
        opened(directory, packing="best_fit", overlap_size=3)


def test_a_packing_of_other_tokens_is_not_used(
    write_dataset: WriteDataset, opened: Callable[..., Dataset], directory: Path
) -> None:
    opened(directory, packing="best_fit")
    write_dataset(train={"code": [[9] * 7, [8]]} | {"wiki": TRAIN["wiki"]}, val=VAL)
    dataset = opened(directory, packing="best_fit")
    assert sorted(dataset.train.targets_of(np.arange(2)).tolist()) == [2, 8]


def test_a_read_only_dataset_keeps_its_index_in_the_cache(
    directory: Path, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_simple.data.locate.os.access", lambda path, mode: False)
    assert opened(directory, packing="best_fit").train.targets == 34
    assert not (directory / "index").exists()
