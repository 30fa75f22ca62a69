"""Raw text becomes a dataset once, whole or not at all."""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_simple.config.schema import Config, Phase
from gpt_simple.data import bulk, shards, tokenize
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.prepare import prepare
from gpt_simple.data.sources.stories import Stories
from gpt_simple.errors import ConfigError, DataError, ExitCode
from gpt_simple.hooks.components import builtin_registry
from tests.conftest import Shell

MakeConfig = Callable[..., Config]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Forty documents of about 40 bytes."""
    (tmp_path / "raw").mkdir()
    for i in range(40):
        (tmp_path / "raw" / f"{i:02}.txt").write_text(f"document {i} says {i * i} and then some more.\n")
    return tmp_path / "raw"


def prepared(config: Config, require_val: bool = True) -> tuple[Dataset, list[str]]:
    messages: list[str] = []
    return prepare(config, builtin_registry(), log=messages.append, require_val=require_val), messages


def decoded(dataset: Dataset, split: str) -> list[str]:
    """The documents of a split, from its tokens."""
    part = getattr(dataset, split)
    inputs, labels = np.empty((2, part.rows, part.max_length), np.int64)
    part.read(np.arange(part.rows), inputs, labels, None)
    tokens = labels[labels != -100]
    ends = np.flatnonzero(tokens == dataset.tokenizer.eod_id)
    assert ends[-1] == len(tokens) - 1
    return [dataset.tokenizer.decode(piece[:-1].tolist()) for piece in np.split(tokens, ends + 1)[:-1]]


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_every_document_is_in_one_split_and_comes_back(
    tokenizer: str, raw: Path, cache: Path, config: MakeConfig
) -> None:
    dataset, _ = prepared(config(path=str(raw), tokenizer=tokenizer, tokenizer_vocab_size=300, val_fraction=0.2))
    found = decoded(dataset, "train") + decoded(dataset, "val")
    assert sorted(found) == sorted(file.read_text() for file in raw.iterdir())
    assert 1 <= dataset.val.documents <= 20
    assert dataset.val.bytes == sum(len(text.encode()) for text in decoded(dataset, "val"))


def test_prepared_data_are_used_again_until_anything_changes(raw: Path, cache: Path, config: MakeConfig) -> None:
    first, said = prepared(config(path=str(raw)))
    assert any("preparing 40 documents" in line for line in said)
    again, said = prepared(config(path=str(raw), max_length=16, seed=9))
    assert [line for line in said if "reusing prepared data" in line]
    assert (again.directory, again.fingerprint) == (first.directory, first.fingerprint)

    fingerprints = {first.fingerprint}
    (raw / "00.txt").write_text("document 0 was edited but is as long as it was")
    fingerprints.add(prepared(config(path=str(raw)))[0].fingerprint)
    for change in ({"val_fraction": 0.3}, {"max_documents": 30}, {"tokenizer": "bpe", "tokenizer_vocab_size": 270}):
        fingerprints.add(prepared(config(path=str(raw), **change))[0].fingerprint)
    assert len(fingerprints) == 5


def test_preparing_twice_gives_the_same_bytes(raw: Path, cache: Path, config: MakeConfig) -> None:
    settings = config(path=str(raw), tokenizer="bpe", tokenizer_vocab_size=300)
    first = prepared(settings)[0].fingerprint
    shutil.rmtree(cache)
    assert prepared(settings)[0].fingerprint == first


def test_equal_texts_are_never_on_both_sides(tmp_path: Path, cache: Path, config: MakeConfig) -> None:
    lines = [json.dumps({"text": f"a text that comes often, number {i % 20}"}) for i in range(400)]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines))
    dataset, _ = prepared(config(path=str(tmp_path / "raw.jsonl"), val_fraction=0.3))
    assert not set(decoded(dataset, "train")) & set(decoded(dataset, "val"))


def test_the_floor_is_the_cross_entropy_of_the_source_on_val(stories: Callable[..., Dataset]) -> None:
    dataset = stories(val_fraction=0.2)
    by_text = {story.text: story.nats for story in Stories(0, 60).documents()}
    held_out = decoded(dataset, "val")
    assert dataset.floor == pytest.approx(math.fsum(by_text[text] for text in held_out) / dataset.val.targets)
    assert dataset.val.targets == sum(len(dataset.tokenizer.encode(text)) + 1 for text in held_out)


def test_stories_differ_by_data_seed_and_not_by_training_seed(stories: Callable[..., Dataset]) -> None:
    assert stories(training_seed=1).fingerprint == stories(training_seed=2).fingerprint
    assert stories(seed=1).fingerprint != stories(seed=2).fingerprint


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path, cache: Path, config: MakeConfig) -> None:
    text = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "one.txt").write_text(text)
    dataset, _ = prepared(config(path=str(tmp_path / "one.txt"), val_fraction=0.1))
    (train,), (val,) = decoded(dataset, "train"), decoded(dataset, "val")
    assert train + val == text
    assert len(val) == pytest.approx(len(text) / 10, abs=1)


def test_of_few_documents_neither_split_is_empty(tmp_path: Path, cache: Path, config: MakeConfig) -> None:
    for count in (2, 3, 5):
        for i in range(count):
            (tmp_path / f"{i}.txt").write_text(f"document {i} of {count}")
        for fraction in (0.01, 0.99):
            dataset, _ = prepared(config(path=str(tmp_path), val_fraction=fraction, format="text"))
            assert dataset.train.documents >= 1
            assert dataset.val.documents >= 1


FILES = {"few": (3, "though .* is 0.05: .* more documents"), "many": (300, r"documents, \d\.\d% of the tokens$")}


@pytest.mark.parametrize("count", FILES)
@pytest.mark.parametrize("way", ["run", "run again", "tokenize", "validate"])
def test_how_much_is_held_out_is_said(
    way: str, count: str, tmp_path: Path, cache: Path, config: MakeConfig, shell: Shell
) -> None:
    (tmp_path / "files").mkdir()
    number, message = FILES[count]
    for i in range(number):
        (tmp_path / "files" / f"{i}.txt").write_text(f"document {i:03} says the same as many others do.\n")
    settings = config(path=str(tmp_path / "files"))
    if way == "validate":
        found = shell("validate", "--data.path", str(tmp_path / "files"), "--data.max_length", "8", "--json").out
        codes = [finding["code"] for finding in json.loads(found)["findings"]]
        assert ("held-out-share" in codes) == (count == "few")
        return
    if way == "tokenize":
        said: list[str] = []
        job = bulk.Job(tmp_path / "files", tmp_path / "out", tokenizer="bytes")
        bulk.tokenize(job, said.append, lambda done, total: None)
    else:
        said = prepared(settings)[1]
        if way == "run again":
            said = prepared(settings)[1]
    notes = [line for line in said if line.startswith("held out")]
    assert [bool(re.search(message, note)) for note in notes] == [True] * (way != "tokenize" or count == "few")


def test_documents_without_text_are_counted_and_skipped(raw: Path, cache: Path, config: MakeConfig) -> None:
    (raw / "none.txt").touch()
    dataset, said = prepared(config(path=str(raw)))
    assert "skipped 1 documents without text" in said
    assert dataset.train.documents + dataset.val.documents == 40


def test_a_tokenizer_learns_from_the_train_split_only(raw: Path, cache: Path, config: MakeConfig) -> None:
    settings = config(path=str(raw), val_fraction=0.2).data
    source = builtin_registry().get("source", "files").load()(settings, 0)
    found = tokenize.survey(source, settings)
    assert found.held_out.any()
    texts = list(tokenize._training_texts(source, settings, found))
    held_out = {text.text for text, out in zip(source.documents(), found.held_out, strict=True) if out}
    assert len(texts) == 40 - len(held_out)
    assert not held_out & set(texts)


def test_a_tokenizer_learns_from_a_bounded_amount_of_text(
    raw: Path, cache: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(path=str(raw)).data
    source = builtin_registry().get("source", "files").load()(settings, 0)
    monkeypatch.setattr(tokenize, "TRAINING_BYTES", 400)
    texts = list(tokenize._training_texts(source, settings, tokenize.survey(source, settings)))
    assert 200 < sum(map(len, texts)) < 500


def test_a_tokenizer_file_is_used_as_it_is(raw: Path, cache: Path, tmp_path: Path, config: MakeConfig) -> None:
    own = prepared(config(path=str(raw), tokenizer="bpe", tokenizer_vocab_size=270))[0].tokenizer
    own.save(tmp_path / "mine")
    dataset, _ = prepared(config(path=str(raw), tokenizer=str(tmp_path / "mine" / "tokenizer.json")))
    assert dataset.tokenizer.fingerprint == own.fingerprint


def test_a_tokenizer_component_with_its_own_files_is_rebuilt(raw: Path, cache: Path, config: MakeConfig) -> None:
    class Shouting:
        name, vocab_size, eod_id, fingerprint = "shouting", 257, 256, "shouting 1"

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [list(text.upper().encode()) for text in texts]

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

        def save(self, directory: Path) -> None:
            directory.mkdir()

    registry = builtin_registry()
    registry.add("tokenizer", "shouting", lambda config, texts: Shouting())
    for _ in range(2):
        dataset = prepare(config(path=str(raw), tokenizer="shouting"), registry)
        assert isinstance(dataset.tokenizer, Shouting)
        assert "DOCUMENT 1 SAYS 1 AND THEN SOME MORE.\n" in decoded(dataset, "train") + decoded(dataset, "val")


BAD: dict[str, tuple[bytes, dict[str, object], type[Exception], str]] = {
    "not UTF-8": (b"x" * 100 + b"\xff", {}, DataError, "byte 100"),
    "too short": (b"x" * 30, {"max_length": 100}, DataError, "shorter than one sample: .*val_fraction 0.05"),
    "nothing held out": (b"x" * 300, {"val_fraction": 0.0}, DataError, "at most 0 tokens in 0 of 1 documents"),
    "no text": (b"", {}, DataError, "all 1 files are empty"),
    "unknown tokenizer": (b"x" * 300, {"tokenizer": "bpee"}, ConfigError, "'bpee' is neither a tokenizer"),
    "missing tokenizer": (b"x" * 300, {"tokenizer": "no/tokenizer.json"}, DataError, "there is no no/tokenizer.json"),
    "unknown source": (b"x" * 300, {"source": "storys"}, ConfigError, "did you mean 'stories'"),
    "overlap in concat": (b"x" * 300, {"overlap_size": 2}, ConfigError, "overlap_size"),
    "overlap of a whole row": (
        b"x" * 300,
        {"packing": "best_fit", "overlap_size": 8},
        ConfigError,
        "8 leaves nothing new",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_and_nothing_is_created(
    name: str, tmp_path: Path, cache: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, change, error, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        prepared(config(**({"path": "text.txt", "val_fraction": 0.05} | change)))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == (ExitCode.DATA if error is DataError else ExitCode.CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bucket_that_does_not_exist_is_named(raw: Path, cache: Path, config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="there is no bucket 'books'; the data have all"):
        prepared(config(path=str(raw), curriculum=(Phase(100, {"books": 1.0}),)))


def test_a_cache_that_cannot_be_written_is_named(
    raw: Path, tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written .*GPT_SIMPLE_CACHE"):
        prepared(config(path=str(raw)))


def test_a_failure_half_way_leaves_no_dataset(
    raw: Path, cache: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_manifest", fail)
        with pytest.raises(KeyboardInterrupt):
            prepared(config(path=str(raw)))
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert prepared(config(path=str(raw)))[0].train.documents > 0


def _prepare_in_child(config: Config, results: multiprocessing.Queue[tuple[str, list[str]]]) -> None:
    dataset, said = prepared(config)
    results.put((dataset.fingerprint, said))


def test_one_of_many_processes_prepares_and_the_others_wait(raw: Path, cache: Path, config: MakeConfig) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    settings = config(path=str(raw), tokenizer="bytes", packing="best_fit")
    children = [context.Process(target=_prepare_in_child, args=(settings, results)) for _ in range(4)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert sum(any("prepared " in line for line in said if "reusing" not in line) for _, said in found) == 1


def test_gzipped_json_lines_and_text_are_one_corpus(raw: Path, cache: Path, config: MakeConfig) -> None:
    (raw / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "from json"}\n'))
    dataset, _ = prepared(config(path=str(raw), val_fraction=0.2))
    assert "from json" in decoded(dataset, "train") + decoded(dataset, "val")


def test_the_standard_library_is_a_corpus(cache: Path, config: MakeConfig) -> None:
    dataset, _ = prepared(config(source="python_stdlib", max_documents=5, val_fraction=0.3))
    assert dataset.train.documents + dataset.val.documents == 5
    assert "__main__" in "".join(decoded(dataset, "train"))


def test_the_cache_directory_follows_the_environment(cache: Path, raw: Path, config: MakeConfig) -> None:
    dataset, _ = prepared(config(path=str(raw)))
    assert os.path.commonpath([dataset.directory, cache]) == str(cache)
