"""A source without number or index: exact rows, exact resume, and nothing that needs to know all documents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from attrs import define

from gpt_simple.config.schema import Config, Phase
from gpt_simple.data import stream as module
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.loader import DataExhausted, Loader, StepData
from gpt_simple.data.locate import check, find
from gpt_simple.data.prepare import prepare
from gpt_simple.data.sources import Document
from gpt_simple.errors import ConfigError, DataError
from gpt_simple.hooks.components import Registry, builtin_registry

T = 8
MakeConfig = Callable[..., Config]


@define
class ListStream:
    """Documents of words; an empty one among them."""

    texts: tuple[str, ...]
    name: str = "listed"

    def fingerprint(self) -> str:
        return f"{self.name} {hash(self.texts)}"

    def stream(self) -> Iterator[Document]:
        return (Document(text, key=text) for text in self.texts)


TEXTS = (*(f"document {i} " * (1 + i % 4) for i in range(150)), "", "the last")


@pytest.fixture(autouse=True)
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_BYTES", 1500)


@pytest.fixture
def opened(config: MakeConfig) -> Callable[..., tuple[Dataset, Config]]:
    def make(texts: tuple[str, ...] = TEXTS, **data: Any) -> tuple[Dataset, Config]:
        settings = config(source="listed", val_fraction=0.2, **data)
        return prepare(settings, registry(texts)), settings

    return make


def registry(texts: tuple[str, ...] = TEXTS) -> Registry:
    made = builtin_registry()
    made.add("source", "listed", lambda config, seed: ListStream(texts))
    return made


Opened = Callable[..., tuple[Dataset, Config]]


def steps(loader: Loader, count: int = 10**6) -> list[StepData]:
    made: list[StepData] = []
    with contextlib.suppress(DataExhausted):
        while len(made) < count:
            made.append(loader.next_step())
    loader.close()
    return made


def targets(made: list[StepData]) -> list[int]:
    return [i for step in made for batch in step.batches for i in batch.labels.flatten().tolist()]


def test_rows_are_the_stream_without_held_out_documents(opened: Opened) -> None:
    dataset, settings = opened(on_exhaustion="halt")
    made = steps(Loader(dataset, settings))
    text = dataset.tokenizer.decode(targets(made))
    # Of a held-out document nothing is trained on; the others come whole, but for what does not fill the last step.
    assert dataset.stream is not None
    read = list(dataset.stream._texts())
    assert "".join(read).startswith(text)
    assert len("".join(read)) - len(text) < 3 * T
    held = [text for text in TEXTS if text and text not in read]
    assert len(held) > 10
    assert dataset.val.documents == sum(int(out) for out in dataset.stream.held_out) > 0
    assert all(batch.targets == 2 * T and step.targets == 2 * T for step in made for batch in step.batches)
    inputs = [i for step in made for batch in step.batches for i in batch.input_ids.flatten().tolist()]
    assert inputs[1:] == targets(made)[:-1]
    assert inputs[0] == dataset.tokenizer.eod_id


@pytest.mark.parametrize("workers", [0, 3])
def test_a_resumed_stream_goes_on_exactly_in_any_world(workers: int, opened: Opened) -> None:
    dataset, settings = opened(on_exhaustion="repeat", num_workers=workers)
    whole = targets(steps(Loader(dataset, settings), 700))
    consumed, seen = 0, []
    for world, count in ((1, 3), (2, 5), (3, 1), (1, 300), (2, 150)):
        ranks = [
            steps(Loader(dataset, settings, world_size=world, rank=rank, consumed=consumed), count)
            for rank in range(world)
        ]
        for parts in zip(*ranks, strict=True):
            assert {part.first_sample for part in parts} == {consumed}
            seen += [i for part in parts for i in targets([part])]
            consumed += parts[0].samples
    assert seen == whole[: len(seen)]
    assert consumed * T > 1.5 * sum(len(text) for text in TEXTS)


def test_max_documents_ends_a_stream(opened: Opened) -> None:
    dataset, _ = opened(max_documents=40)
    assert dataset.stream is not None
    read = list(dataset.stream._texts())
    assert read == [text for text in TEXTS[:40] if text in read]
    assert 20 < len(read) < 40


def test_documents_are_masked_as_in_shards(opened: Opened) -> None:
    dataset, settings = opened(document_mask=True)
    batch = steps(Loader(dataset, settings), 1)[0].batches[0]
    assert batch.position_ids is not None
    begins = batch.input_ids == dataset.tokenizer.eod_id
    begins[:, 0] = True
    assert (batch.position_ids == 0).equal(begins)


def test_the_val_split_is_that_of_the_head_and_kept(opened: Opened) -> None:
    first, settings = opened()
    batches = list(Loader(first, settings).val_batches())
    assert sum(batch.targets for batch in batches) == first.val.targets > 0
    assert opened()[0].directory == first.directory
    assert opened((*TEXTS[1:],))[0].fingerprint != first.fingerprint
    assert find(check(settings, registry()), settings, registry()) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("packing", "best_fit"),
        ("on_exhaustion", "renormalise"),
        ("curriculum", (Phase(8, {"all": 1.0}),)),
    ],
)
def test_what_needs_an_index_is_refused(field: str, value: object, config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{field}: the source listed has no index; expected "):
        prepare(config(source="listed", **{field: value}), registry())


def test_a_stream_of_nothing_is_named(opened: Opened, config: MakeConfig) -> None:
    with pytest.raises(DataError, match="no document has any text"):
        opened(("", ""))
    with pytest.raises(DataError, match="are one document; nothing can be held out"):
        opened(("a single text that is long enough for a row " * 9,))


def test_a_document_that_ends_as_a_block_does_loses_nothing(opened: Opened) -> None:
    dataset, _ = opened()
    assert dataset.stream is not None
    rows = next(dataset.stream.blocks(0, repeat(50)))
    for consumed in range(45):
        again = next(dataset.stream.blocks(consumed, repeat(5)))
        assert np.array_equal(again, rows[consumed : consumed + 5])


def test_a_long_stream_yields_each_document_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what is tokenized at once; a run that is resumed in the middle goes on there."""
    monkeypatch.setattr(module, "HEAD_BYTES", 50_000)
    texts = tuple(f"<{i}>" + "a" * 2000 for i in range(400))
    dataset, settings = opened(texts, max_length=512, on_exhaustion="halt")
    assert dataset.stream is not None
    read = list(dataset.stream._texts())
    whole = steps(Loader(dataset, settings))
    text = dataset.tokenizer.decode(targets(whole))
    assert len(text) > 600_000
    assert "".join(read).startswith(text)
    middle = len(whole) // 2
    rest = steps(Loader(dataset, settings, consumed=sum(step.samples for step in whole[:middle])))
    assert targets(rest) == targets(whole[middle:])
