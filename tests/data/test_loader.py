"""Batches: the right rows for every rank, once each, wherever a run stops and however it goes on."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve

from gpt_simple.config.schema import Config, Phase
from gpt_simple.data import loader as module
from gpt_simple.data.dataset import IGNORED, Dataset
from gpt_simple.data.loader import DataExhausted, Loader, StepData
from gpt_simple.data.locate import order_seed
from gpt_simple.data.prepare import prepare
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.components import builtin_registry

MakeConfig = Callable[..., Config]
WriteDataset = Callable[..., Path]
T = 8


@pytest.fixture
def directory(write_dataset: WriteDataset) -> Path:
    """Two buckets in several shards; no row's targets are those of another row."""
    documents = [[1 + i // 200, 1 + i % 200] * (1 + i % 7) for i in range(120)]
    return write_dataset(
        shard_tokens=200, train={"a": documents[:50], "b": documents[50:]}, val={"all": documents[::5]}
    )


@pytest.fixture
def opened(directory: Path, config: MakeConfig) -> Callable[..., tuple[Dataset, Config]]:
    def make(**settings: object) -> tuple[Dataset, Config]:
        settings = {"max_length": T} | settings
        made = config(path=str(directory), **settings)
        return prepare(made, builtin_registry()), made

    return make


def labels_of(dataset: Dataset, rows: np.ndarray) -> list[list[int]]:
    inputs, labels = np.empty((2, len(rows), T), np.int64)
    dataset.train.read(rows, inputs, labels, None)
    return labels.tolist()


def steps(loader: Loader, count: int) -> list[StepData]:
    try:
        return [loader.next_step() for _ in range(count)]
    finally:
        loader.close()


CURRICULUM = (Phase(40 * T, {"a": 3.0, "b": 1.0}), Phase(80 * T, {"b": 1.0}), Phase(1, {"a": 1.0, "b": 2.0}))


@pytest.mark.parametrize("curriculum", [(), CURRICULUM])
@pytest.mark.parametrize("seed", range(4))
def test_any_stops_and_world_sizes_give_the_samples_in_order(
    seed: int, curriculum: tuple[Phase, ...], opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    rng = random.Random(seed)
    consumed, seen = 0, []
    dataset = None
    while consumed < 500:
        world, count = rng.choice([1, 2, 3, 4]), rng.randrange(1, 6)
        dataset, config = opened(
            B=rng.choice([1, 2, 3]), A=rng.choice([1, 2, 4]), num_workers=rng.choice([0, 1, 3]), curriculum=curriculum
        )
        ranks = [
            steps(Loader(dataset, config, world_size=world, rank=rank, consumed=consumed), count)
            for rank in range(world)
        ]
        for step in zip(*ranks, strict=True):
            batches = sorted((batch for data in step for batch in data.batches), key=lambda batch: batch.first_sample)
            assert step[0].first_sample == consumed
            for batch in batches:
                assert batch.first_sample == consumed
                seen += batch.labels.tolist()
                consumed += len(batch.labels)
            samples = consumed - step[0].first_sample
            assert {(data.samples, data.tokens) for data in step} == {(samples, samples * T)}
            targets = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
            assert {data.targets for data in step} == {targets}
            assert sum(batch.targets for batch in batches) == targets
    assert dataset is not None
    order = dataset.order(config.data, order_seed(config))
    assert seen == labels_of(dataset, order.locate(np.arange(consumed)))


def test_inputs_are_the_labels_one_later(opened: Callable[..., tuple[Dataset, Config]]) -> None:
    dataset, config = opened(B=4)
    for data in steps(Loader(dataset, config), 30):
        (batch,) = data.batches
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.position_ids is None
        assert batch.document_ids is None
        inside = batch.labels[:, :-1] != IGNORED
        assert torch.equal(batch.input_ids[:, 1:][inside], batch.labels[:, :-1][inside])


def test_returned_batches_are_never_overwritten(opened: Callable[..., tuple[Dataset, Config]]) -> None:
    dataset, config = opened(num_workers=2)
    loader = Loader(dataset, config)
    held = []
    for _ in range(300):
        batch = loader.next_step().batches[0]
        held.append((batch.labels, batch.labels.clone()))
    loader.close()
    assert all(torch.equal(now, then) for now, then in held)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_evaluation_scores_every_val_token_once(
    packing: str, world: int, opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    dataset, config = opened(B=3, packing=packing, num_workers=world % 2)
    shares: list[list[Batch]] = []
    for rank in range(world):
        loader = Loader(dataset, config, world_size=world, rank=rank)
        shares.append(list(loader.val_batches()))
        loader.close()
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(3, T)}
    assert sum(batch.targets for batch in batches) == dataset.val.targets
    assert [int((batch.labels != IGNORED).sum()) for batch in batches] == [batch.targets for batch in batches]
    scored = torch.cat([batch.labels[batch.labels != IGNORED] for batch in batches])
    inputs, labels = np.empty((2, dataset.val.rows, T), np.int64)
    dataset.val.read(np.arange(dataset.val.rows), inputs, labels, None)
    assert sorted(scored.tolist()) == sorted(labels[labels != IGNORED].tolist())


def test_a_capped_evaluation_takes_the_same_rows_in_every_world(opened: Callable[..., tuple[Dataset, Config]]) -> None:
    dataset, config = opened(B=2)
    found = []
    for world in (1, 2, 3):
        rows = []
        for rank in range(world):
            loader = Loader(dataset, config, world_size=world, rank=rank)
            for batch in loader.val_batches(max_batches=5):
                rows += [row for row in batch.labels.tolist() if set(row) != {IGNORED}]
            loader.close()
        found.append(sorted(rows))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 10
    assert found[0] != sorted(labels_of_val(dataset)[:10])


def labels_of_val(dataset: Dataset) -> list[list[int]]:
    inputs, labels = np.empty((2, dataset.val.rows, T), np.int64)
    dataset.val.read(np.arange(dataset.val.rows), inputs, labels, None)
    return labels.tolist()


def test_an_evaluation_in_the_middle_does_not_move_training(opened: Callable[..., tuple[Dataset, Config]]) -> None:
    dataset, config = opened(num_workers=1)
    plain = [step.batches[0].labels.tolist() for step in steps(Loader(dataset, config), 80)]
    loader = Loader(dataset, config)
    found = []
    for number in range(80):
        found.append(loader.next_step().batches[0].labels.tolist())
        if number % 7 == 0:
            next(loader.val_batches())  # and abandon it
    loader.close()
    assert found == plain


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_are_read_once_end_with_the_last_whole_step(
    workers: int, opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    dataset, config = opened(B=4, on_exhaustion="halt", num_workers=workers)
    loader = Loader(dataset, config)
    assert loader.samples_total() == dataset.train.rows
    for _ in range(dataset.train.rows // 4):
        loader.next_step()
    for _ in range(2):
        with pytest.raises(DataExhausted, match=f"after {dataset.train.rows:,} samples"):
            loader.next_step()
    loader.close()
    assert Loader(*opened()).samples_total() is None


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_document_mask_restarts_positions_in_every_document(
    packing: str, opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    dataset, config = opened(B=8, packing=packing, document_mask=True)
    loader = Loader(dataset, config)
    batches = [*(loader.next_step().batches[0] for _ in range(20)), *loader.val_batches()]
    loader.close()
    for batch in batches:
        assert batch.position_ids is not None
        assert batch.document_ids is not None
        for tokens, positions, documents, labels in zip(
            batch.input_ids.tolist(),
            batch.position_ids.tolist(),
            batch.document_ids.tolist(),
            batch.labels.tolist(),
            strict=True,
        ):
            assert positions[0] == documents[0] == 0
            for i in range(1, T):
                begins = positions[i] == 0
                assert documents[i] == documents[i - 1] + begins
                assert begins or positions[i] == positions[i - 1] + 1
                # Only a later window of a long document begins with anything else than the end of another.
                if labels[i] != IGNORED and (packing == "concat" or tokens[i] == 0):
                    assert begins == (tokens[i] == 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_thread_is_raised_by_next_step(
    workers: int, directory: Path, opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    dataset, config = opened(num_workers=workers)
    file = next((directory / "train/b").glob("*.bin"))
    time_before = file.stat().st_mtime_ns
    with file.open("r+b") as stream:
        stream.seek(40)
        stream.write(b"\xff\xff" * 8)
    # As damage below the file system, which changes no time.
    os.utime(file, ns=(time_before, time_before))
    loader = Loader(dataset, config)
    with pytest.raises(DataError, match="is beyond the vocabulary of 257"):
        steps(loader, 500)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("change", ["cut off", "rewritten", "gone"])
def test_a_file_that_changes_while_a_run_reads_it_is_named(
    change: str,
    suffix: str,
    opened: Callable[..., tuple[Dataset, Config]],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK_STEPS", 1)
    dataset, config = opened()
    loader = Loader(dataset, config)
    loader.next_step()
    for file in directory.rglob("train/*/*.bin"):
        # Another time alone, as a copy of the data set leaves it, is no change.
        os.utime(file, ns=(1, 1))
    loader.next_step()
    for file in directory.rglob(f"train/*/*.{suffix}"):
        if change == "gone":
            file.unlink()
        elif change == "cut off":
            with file.open("r+b") as stream:
                stream.truncate(10)
        else:
            file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(DataError, match=rf"shard-0000.\.{suffix}: has changed, or is gone, since the run began"):
        steps(loader, 50)


def test_closing_never_waits_for_queued_reads(
    opened: Callable[..., tuple[Dataset, Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, config = opened(num_workers=3)
    loader = Loader(dataset, config)
    loader.next_step()
    begin = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - begin < 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_waiting_is_counted(opened: Callable[..., tuple[Dataset, Config]], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, config = opened(num_workers=1)
    read = Loader._read

    def slow(*arguments: object, **options: object) -> object:
        time.sleep(0.05)
        return read(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Loader, "_read", slow)
    monkeypatch.setattr(module, "CHUNK_STEPS", 1)
    loader = Loader(dataset, config)
    for _ in range(4):
        loader.next_step()
    loader.close()
    assert 0.1 < loader.wait_seconds < 2


def test_a_far_position_is_as_quick_as_the_first(opened: Callable[..., tuple[Dataset, Config]]) -> None:
    dataset, config = opened(curriculum=CURRICULUM)
    begin = time.perf_counter()
    steps(Loader(dataset, config, consumed=10**12), 1)
    assert time.perf_counter() - begin < 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_device(opened: Callable[..., tuple[Dataset, Config]]) -> None:
    dataset, config = opened(num_workers=1, document_mask=True)
    host = [step.batches[0] for step in steps(Loader(dataset, config), 100)]
    device = [step.batches[0] for step in steps(Loader(dataset, config, device="cuda"), 100)]
    for here, there in zip(host, device, strict=True):
        assert there.input_ids.is_cuda
        assert torch.equal(here.labels, there.labels.cpu())
        assert torch.equal(here.document_ids, there.document_ids.cpu())  # type: ignore[arg-type, union-attr]


def rows_of(batches: list[Batch]) -> list[list[int]]:
    return [labels for batch in batches for labels in batch.labels.tolist()]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("cap", [None, 1])
def test_a_bucket_of_the_val_split_is_read_alone(cap: int | None, world: int, write_dataset: WriteDataset) -> None:
    documents = [[1 + i % 250] * (5 + i % 7) for i in range(60)]
    path = write_dataset(train={"a": documents}, val={"a": documents[:20], "b": documents[20:30], "c": documents[30:]})
    config = Config()
    config = evolve(
        config,
        data=evolve(config.data, path=str(path), tokenizer="bytes", max_length=T, num_workers=0),
        training=evolve(config.training, per_device_batch_size=3, eval_steps=1),
    )
    dataset = prepare(config, builtin_registry())
    loaders = [Loader(dataset, config, world_size=world, rank=rank) for rank in range(world)]
    every = [labels for labels in rows_of(list(Loader(dataset, config).val_batches())) if set(labels) != {IGNORED}]
    found, begin = [], 0
    for bucket, rows in dataset.val.buckets.items():
        shares = [list(loader.val_batches(cap, bucket)) for loader in loaders]
        assert len({len(share) for share in shares}) == 1
        mine = sorted(row for share in shares for row in rows_of(share) if set(row) != {IGNORED})
        own = every[begin : begin + rows]
        assert len(mine) == min(rows, rows if cap is None else cap * 3)
        assert all(row in own for row in mine)
        found += mine
        begin += rows
    assert cap is not None or sorted(found) == sorted(every)


@pytest.mark.parametrize("curriculum", [(), CURRICULUM])
def test_samples_are_read_again_in_the_order_asked(
    curriculum: tuple[Phase, ...], opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    dataset, config = opened(B=2, curriculum=curriculum, num_workers=1)
    loader = Loader(dataset, config, world_size=2, rank=1)
    trained = {
        data.first_sample + i: labels
        for data in steps(Loader(dataset, config), 60)
        for i, labels in enumerate(data.batches[0].labels.tolist())
    }
    ids = np.array([90, 3, 3, 0, 57, 88, 11])
    batches = list(loader.batches(ids))
    assert [batch.first_sample for batch in batches] == [90, 3, 57, 11]
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(2, T)}
    assert rows_of(batches) == [*(trained[sample] for sample in ids.tolist()), [IGNORED] * T]
    assert [batch.targets for batch in batches] == [int((batch.labels != IGNORED).sum()) for batch in batches]
    assert not list(loader.batches(np.array([], np.int64)))
    assert loader.next_step().first_sample == 0, "the position stays"
    loader.close()
