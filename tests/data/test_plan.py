"""The batch plan: each sample once, in order, whatever the stages, wherever a run stops and however it goes on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_simple.config.schema import Config, Phase, WarmupStage
from gpt_simple.data.dataset import IGNORED, Dataset
from gpt_simple.data.loader import DataExhausted, Loader, StepData
from gpt_simple.data.locate import order_seed
from gpt_simple.data.plan import BatchPlan
from gpt_simple.data.prepare import prepare
from gpt_simple.hooks.components import builtin_registry
from tests.data.test_stream import TEXTS, registry

T = 8
MakeConfig = Callable[..., Config]
WriteDataset = Callable[..., Path]

stages = st.lists(
    st.builds(
        WarmupStage,
        steps=st.integers(1, 6),
        gradient_accumulation_steps=st.none() | st.integers(1, 5),
        length=st.sampled_from([None, 2, 4, 8]),
    ),
    max_size=4,
).map(tuple)
rows = st.integers(1, 4)


def configured(warmup: tuple[WarmupStage, ...], batch: int, accumulation: int) -> Config:
    config = Config()
    training = evolve(
        config.training,
        warmup_stages=warmup,
        per_device_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    return evolve(config, data=evolve(config.data, max_length=T), training=training)


def sizes(config: Config, world: int) -> list[int]:
    """Samples of each of the first steps, counted one by one."""
    training, found = config.training, []
    for stage in (*training.warmup_stages, WarmupStage(20)):
        accumulation = stage.gradient_accumulation_steps or training.gradient_accumulation_steps
        found += [accumulation * training.per_device_batch_size * world] * stage.steps
    return found


@settings(deadline=None)
@given(stages, rows, rows, st.integers(1, 3))
def test_steps_follow_one_another_without_gap(
    warmup: tuple[WarmupStage, ...], batch: int, accumulation: int, world: int
) -> None:
    config = configured(warmup, batch, accumulation)
    plan, samples = BatchPlan.of(config, world_size=world), 0
    for step, size in enumerate(sizes(config, world), 1):
        planned = plan.at(step)
        assert (planned.first_sample, planned.stage.samples) == (samples, size)
        assert plan.samples_after(step - 1) == samples
        assert planned.stage.tokens == size * T == world * planned.stage.accumulation * batch * T
        assert planned.stage.rows * planned.stage.length == batch * T, "a micro-batch keeps its number of tokens"
        for total in range(samples, samples + size):
            assert plan.last_step(total) == step - 1
        assert plan.stage_end(step) is None or plan.at(plan.stage_end(step) - 1).stage == planned.stage
        samples += size
    assert plan.tokens_between(2, 9) == sum(sizes(config, world)[2:9]) * T


@settings(deadline=None)
@given(st.lists(st.tuples(stages, rows, rows, st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=5))
def test_launches_with_any_plans_read_each_sample_once(launches: list[Any]) -> None:
    """Each launch has a plan, a batch and a number of processes of its own."""
    step, samples, seen = 0, 0, []
    for warmup, batch, accumulation, world, count in launches:
        config = configured(warmup, batch, accumulation)
        plan = BatchPlan.of(config, world_size=world, step=step, samples=samples)
        assert plan.samples_after(step) == plan.samples_after(0) == samples
        for step in range(step + 1, step + count + 1):  # noqa: B020
            planned = plan.at(step)
            assert planned.stage.samples == sizes(config, world)[min(step, len(sizes(config, world))) - 1]
            seen += range(planned.first_sample, planned.first_sample + planned.stage.samples)
        samples = plan.samples_after(step)
        assert plan.last_step(samples) == step
    assert seen == list(range(samples))


def test_stages_between_steps_are_those_that_they_belong_to() -> None:
    warmup = (WarmupStage(2, 1, 4), WarmupStage(3, 2, None))
    plan = BatchPlan.of(configured(warmup, 2, 4), world_size=2)
    first, second, last = plan.stages
    assert (first.first_step, first.accumulation, first.rows, first.length, first.samples, first.tokens) == (
        *(1, 1, 4, 4, 4, 32),
    )
    assert (second.first_step, last.first_step) == (3, 6)
    for low, high, expected in ((1, 2, [first]), (2, 3, [first, second]), (5, 5, [second]), (1, 99, [*plan.stages])):
        assert plan.between(low, high) == expected


WARMUP = (WarmupStage(3, 1, 2), WarmupStage(4, 3, 4), WarmupStage(2, 2, None), WarmupStage(5, None, 4))
CURRICULUM = (Phase(40 * T, {"a": 3.0, "b": 1.0}), Phase(80 * T, {"b": 1.0}), Phase(1, {"a": 1.0, "b": 2.0}))


@pytest.fixture
def opened(write_dataset: WriteDataset, config: MakeConfig) -> Callable[..., tuple[Dataset, Config]]:
    """Two buckets in several shards; no row's targets are those of another row."""
    documents = [[1 + i // 200, 1 + i % 200] * (1 + i % 7) for i in range(120)]
    directory = write_dataset(
        shard_tokens=200, train={"a": documents[:50], "b": documents[50:]}, val={"all": documents[::5]}
    )

    def make(*, warmup: tuple[WarmupStage, ...] = WARMUP, **fields: Any) -> tuple[Dataset, Config]:
        made = config(path=str(directory), **{"max_length": T, "A": 2} | fields)
        made = evolve(made, training=evolve(made.training, warmup_stages=warmup))
        return prepare(made, builtin_registry()), made

    return make


def steps(loader: Loader, count: int = 10**6) -> list[StepData]:
    found: list[StepData] = []
    try:
        while len(found) < count:
            found.append(loader.next_step())
    except DataExhausted:
        pass
    finally:
        loader.close()
    return found


def read_in_parts(dataset: Dataset, config: Config, parts: list[tuple[int, int]]) -> tuple[list[Any], int]:
    """The labels, uncut, that launches of (processes, steps) read in their order, and the samples."""
    step, consumed, labels = 0, 0, []
    for world, count in parts:
        loaders = [
            Loader(dataset, config, world_size=world, rank=rank, step=step, consumed=consumed) for rank in range(world)
        ]
        plan = loaders[0].plan
        for ranks in zip(*(steps(loader, count) for loader in loaders), strict=True):
            step += 1
            stage = plan.at(step).stage
            assert {(data.first_sample, data.samples, data.tokens) for data in ranks} == {
                (consumed, stage.samples, stage.tokens)
            }
            batches = sorted((batch for data in ranks for batch in data.batches), key=lambda batch: batch.first_sample)
            assert len(batches) == world * stage.accumulation
            for batch in batches:
                assert batch.first_sample == consumed
                assert tuple(batch.input_ids.shape) == tuple(batch.labels.shape) == (stage.rows, stage.length)
                assert batch.targets == int((batch.labels != IGNORED).sum())
                labels += batch.labels.reshape(-1, T).tolist()
                consumed += config.training.per_device_batch_size
            assert {data.targets for data in ranks} == {sum(batch.targets for batch in batches)}
    return labels, consumed


PARTS = [[(1, 40)], [(1, 2), (2, 3), (3, 5), (1, 1), (2, 20)], [(2, 1), (1, 4), (4, 4), (2, 12)]]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_workers": 2},
        {"curriculum": CURRICULUM},
        {"packing": "best_fit", "overlap_size": 3},
        {"packing": "best_fit", "document_mask": True, "B": 3},
    ],
    ids=str,
)
def test_stages_cut_the_samples_in_their_order(
    fields: dict[str, Any], parts: list[tuple[int, int]], opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    """Interrupted in each of the stages, on other numbers of processes."""
    dataset, config = opened(**fields)
    seen, consumed = read_in_parts(dataset, config, parts)
    inputs, labels = np.empty((2, consumed, T), np.int64)
    order = dataset.order(config.data, order_seed(config))
    dataset.train.read(order.locate(np.arange(consumed)), inputs, labels, None)
    assert seen == labels.tolist()


@pytest.mark.parametrize("parts", PARTS)
def test_stages_cut_a_stream_in_its_order(parts: list[tuple[int, int]], config: MakeConfig) -> None:
    made = config(source="listed", val_fraction=0.2, A=2)
    made = evolve(made, training=evolve(made.training, warmup_stages=WARMUP))
    dataset = prepare(made, registry(TEXTS))
    seen, consumed = read_in_parts(dataset, made, parts)
    assert dataset.stream is not None
    assert seen == next(dataset.stream.blocks(0, repeat(consumed)))[:, 1:].tolist()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_positions_restart_in_each_cut_row(packing: str, opened: Callable[..., tuple[Dataset, Config]]) -> None:
    """And where a document begins in the whole sample, so no row has more than its own documents."""
    fields: dict[str, Any] = {"packing": packing, "document_mask": True, "B": 3, "A": 1}
    dataset, cut = opened(warmup=(WarmupStage(30, None, 4),), **fields)
    _, whole = opened(warmup=(), **fields)
    for short, long in zip(steps(Loader(dataset, cut), 30), steps(Loader(dataset, whole), 30), strict=True):
        (batch,), (sample,) = short.batches, long.batches
        assert torch.equal(batch.input_ids, sample.input_ids.view(-1, 4))
        assert torch.equal(batch.labels, sample.labels.view(-1, 4))
        assert batch.position_ids is not None
        assert batch.document_ids is not None
        assert sample.position_ids is not None
        begins = sample.position_ids.view(-1, 4) == 0
        begins[:, 0] = True
        assert torch.equal(batch.position_ids == 0, begins)
        assert torch.equal(batch.document_ids, begins.cumsum(1) - 1)
        assert torch.equal(batch.position_ids[:, 1:][~begins[:, 1:]], batch.position_ids[:, :-1][~begins[:, 1:]] + 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_data_end_with_the_last_whole_step_of_a_plan(
    world: int, workers: int, opened: Callable[..., tuple[Dataset, Config]]
) -> None:
    """A step that does not fit is the end, also where a later stage has smaller ones."""
    for warmup in (WARMUP, (WarmupStage(2, 1), WarmupStage(9, 40), WarmupStage(1, 1))):
        dataset, config = opened(warmup=warmup, on_exhaustion="halt", num_workers=workers)
        loader = Loader(dataset, config, world_size=world)
        last = loader.last_step()
        found = steps(loader)
        assert len(found) == last
        total = dataset.train.rows
        assert sum(step.samples for step in found) <= total
        assert sum(step.samples for step in found) + loader.plan.at(len(found) + 1).stage.samples > total


def test_an_evaluation_has_whole_rows_in_each_stage(opened: Callable[..., tuple[Dataset, Config]]) -> None:
    dataset, config = opened()
    loader = Loader(dataset, config)
    loader.next_step()
    batches = list(loader.val_batches())
    loader.close()
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(2, T)}
    assert sum(batch.targets for batch in batches) == dataset.val.targets
