"""nanoGPT's files: trained on where they are, with the tokenizer that the user names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_simple.config.schema import Config
from gpt_simple.data.dataset import IGNORED, Dataset
from gpt_simple.data.inspect import inspect
from gpt_simple.data.locate import check, find
from gpt_simple.data.prepare import prepare
from gpt_simple.data.tokenizer import bpe, load_tokenizer
from gpt_simple.errors import ConfigError, DataError
from gpt_simple.hooks.components import builtin_registry

MakeConfig = Callable[..., Config]
TRAIN = [5, 6, 7, 0, 8, 9, 0, 0, 300, 11, 12, 13, 14, 15, 16, 17, 18]
VAL = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    np.array(TRAIN, "<u2").tofile(folder / "train.bin")
    np.array(VAL, "<u2").tofile(folder / "val.bin")
    texts = iter([" ".join(f"w{i}x" for i in range(200))])
    bpe(Config().data, lambda: texts).save(tmp_path / "tokenizer")
    return folder


@pytest.fixture
def opened(config: MakeConfig, directory: Path, tmp_path: Path) -> Callable[..., Dataset]:
    tokenizer = str(tmp_path / "tokenizer")
    return lambda **data: prepare(config(path=str(directory), **({"tokenizer": tokenizer} | data)), builtin_registry())


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_token_but_the_first_is_a_target_once(packing: str, opened: Callable[..., Dataset]) -> None:
    dataset = opened(packing=packing)
    split = dataset.train
    inputs, labels = np.empty((2, split.rows, 8), np.int64)
    split.read(np.arange(split.rows), inputs, labels, None)
    assert sorted(labels[labels != IGNORED].tolist()) == sorted(TRAIN[1:])
    assert (split.targets, split.documents) == (16, 4)
    sizes = dataset.tokenizer.token_bytes()
    assert split.bytes == sizes[TRAIN[1:]].sum()
    assert dataset.val.targets == 9


def test_inspect_shows_counts_and_largest_ids(directory: Path) -> None:
    about, train, val = inspect(directory, sample_tokens=5, log=print)
    assert "nanoGPT's files of uint16 ids" in about
    assert (train, val) == (
        "train.bin: 17 tokens, the largest id is 300",
        "val.bin: 10 tokens, the largest id is 9",
    )
    (directory / "val.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"val\.bin: 3 bytes are not a list of uint16 ids"):
        inspect(directory, sample_tokens=5, log=print)


def test_the_files_are_neither_copied_nor_changed_and_read_once(
    opened: Callable[..., Dataset], directory: Path, config: MakeConfig, tmp_path: Path
) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}
    settings = config(path=str(directory), tokenizer=str(tmp_path / "tokenizer"))
    source = check(settings, builtin_registry())
    assert find(source, settings, builtin_registry()) is None
    first = opened()
    assert {file.name: file.stat().st_mtime_ns for file in directory.iterdir()} == before
    assert first.train.parts[0].shard.path.resolve() == directory / "train.bin"
    found = find(source, settings, builtin_registry())
    assert found is not None
    assert found[0] == first.directory == opened().directory
    np.array(TRAIN[:-1], "<u2").tofile(directory / "train.bin")
    os.utime(directory / "train.bin", ns=(1, 1))
    assert opened().fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("error", "message", "content", "tokenizer"),
    [
        (ConfigError, r"do not say what their ids mean; expected the path", None, "bpe"),
        (DataError, r"token 300 at position 8 is beyond the 257 ids of the tokenizer bytes", None, "bytes"),
        (DataError, r"train\.bin: 5 bytes are not a list of uint16 ids", b"12345", None),
        (DataError, r"train\.bin: 0 bytes are not a list of uint16 ids", b"", None),
    ],
)
def test_what_is_wrong_is_named(
    error: type[Exception],
    message: str,
    content: bytes | None,
    tokenizer: str | None,
    opened: Callable[..., Dataset],
    directory: Path,
) -> None:
    if content is not None:
        (directory / "train.bin").write_bytes(content)
    with pytest.raises(error, match=message):
        opened(**({} if tokenizer is None else {"tokenizer": tokenizer}))


def test_a_vocabulary_beyond_uint16_is_not_theirs(
    opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    object.__setattr__(tokenizer, "vocab_size", 70_000)
    monkeypatch.setattr("gpt_simple.data.locate.load_tokenizer", lambda *path: tokenizer)
    with pytest.raises(DataError, match=r"holds uint16 ids, and the tokenizer .* has 70,000"):
        opened()
