"""``run``: samples that a plugin reads again, and buckets of the val split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt_simple import GptSimpleError, PluginError, hookimpl
from gpt_simple.testing import train, train_on_ranks
from tests.children import At, Everywhere
from tests.data.conftest import write_dataset
from tests.tiny import TINY, TinyRun, state_bytes

__all__ = ["write_dataset"]


class OnMain(At):
    """Runs on the main process alone."""

    ranks = "main"


def test_batches_are_those_of_training_and_change_nothing(tiny: TinyRun) -> None:
    seen: dict[int, Any] = {}
    read: list[Any] = []

    class Sees(Everywhere):
        @hookimpl
        def on_batch(self, run: Any, event: Any) -> None:
            for i, row in enumerate(event.batch.labels.tolist()):
                seen[event.batch.first_sample + i] = row

    def probe(run: Any) -> None:
        assert not list(run.batches([]))
        with run.evaluating():
            for batch in run.batches(np.array([5, 0, 9])):
                assert run.loss(batch).isfinite()
                read.append(batch)

    options = {"model__dropout": 0.1, "data__num_workers": 1}
    plain = tiny("plain", **options)
    probed = tiny("probed", plugins=[Sees(), At("on_step_end", 4, probe)], **options)
    assert state_bytes(plain) == state_bytes(probed)
    assert [row for batch in read for row in batch.labels.tolist()][:3] == [seen[5], seen[0], seen[9]]
    assert [batch.first_sample for batch in read] == [5, 9]


def test_every_process_gets_the_same_batches(tmp_path: Path) -> None:
    """A process alone may ask: nothing waits for another one."""

    def write(where: Path) -> Callable[[Any], None]:
        return lambda run: where.with_suffix(f".{run.rank}").write_text(
            json.dumps([(batch.first_sample, batch.labels.tolist()) for batch in run.batches(range(7, 2, -1))])
        )

    train(At("on_step_start", 2, write(tmp_path / "one")))
    asked = [At("on_step_start", 2, write(tmp_path / "two")), OnMain("on_step_end", 1, write(tmp_path / "main"))]
    assert [outcome.error for outcome in train_on_ranks(*asked)] == ["", ""]
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(texts) == ["main.0", "one.0", "two.0", "two.1"]
    assert len(set(texts.values())) == 1


def test_ids_may_be_of_any_integer_type(tiny: TinyRun) -> None:
    def probe(run: Any) -> None:
        for ids in (range(3), (0, 1, 2), np.arange(3), torch.arange(3), iter([0, 1, 2]), np.arange(3, dtype=np.uint8)):
            assert [batch.first_sample for batch in run.batches(ids)] == [0, 2]

    assert tiny(plugins=[At("on_step_end", 1, probe)]).status == "completed"


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([-1], {}, "-1, which is no sample of the order; expected integers from 0$"),
        ([0, 1.5], {}, "given 1.5 as a sample"),
        ([True], {}, "True, which is no sample"),
        ([[1, 2]], {}, r"given \[1, 2\] as a sample"),
        (["1"], {}, "given '1' as a sample"),
        ([10**30], {}, "no sample of the order"),
        ([10**6], {"data__on_exhaustion": "halt"}, "1000000, which is no sample of the order; expected .* to [0-9]+$"),
    ],
)
def test_ids_that_are_no_samples_are_refused_at_once(
    ids: list[Any], options: dict[str, Any], message: str, tiny: TinyRun
) -> None:
    refused = []

    def probe(run: Any) -> None:
        try:
            run.batches(ids)
        except PluginError as error:
            refused.append(error)
            raise

    with pytest.raises(PluginError, match=message) as raised:
        tiny(plugins=[At("on_step_end", 1, probe)], **options)
    assert refused
    assert raised.value.exit_code == 5


def test_a_view_that_is_too_early_has_no_batches(tiny: TinyRun) -> None:
    with pytest.raises(GptSimpleError, match=r"run\.batches does not exist yet: it is there from on_run_start on"):
        tiny(plugins=[At("on_model_built", 0, lambda run: run.batches([0]))])


@pytest.fixture
def buckets(write_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny run reads a data set with the val buckets ``code`` and ``wiki``."""
    documents = [[1 + i % 250] * 50 for i in range(40)]
    path = write_dataset(train={"code": documents}, val={"code": documents[:8], "wiki": documents[8:20]})
    for key, value in {"source": "shards", "path": str(path)}.items():
        monkeypatch.setitem(TINY["data"], key, value)


class Evaluates(Everywhere):
    """Does ``work(run)`` in ``evaluate``."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        super().__init__()
        self.work = work

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Any]:
        self.work(run)
        return {}


@pytest.mark.usefixtures("buckets")
def test_the_buckets_of_the_val_split_add_up_to_it(tiny: TinyRun) -> None:
    targets: dict[Any, int] = {}

    def count(run: Any) -> None:
        known = run.facts()["data"]["val"]["buckets"]
        assert list(known) == ["code", "wiki"]
        for bucket in (None, *known):
            targets[bucket] = sum(batch.targets for batch in run.val_batches(bucket=bucket))

    tiny(plugins=[Evaluates(count)], training__eval_steps=6)
    assert targets[None] == targets["code"] + targets["wiki"] > targets["wiki"] > targets["code"] > 0


@pytest.mark.usefixtures("buckets")
@pytest.mark.parametrize("bucket", ["wikki", "all", "", 3, ["wiki"]])
def test_an_unknown_bucket_is_refused_at_once(bucket: Any, tiny: TinyRun) -> None:
    meant = r" \(did you mean 'wiki'\?\)" if bucket in ("wikki", ["wiki"]) else ""
    with pytest.raises(PluginError, match=rf"the val split has no bucket .*{meant}; it has code, wiki") as raised:
        tiny(plugins=[Evaluates(lambda run: run.val_batches(bucket=bucket))], training__eval_steps=6)
    assert raised.value.exit_code == 5


def test_the_precision_is_known_before_the_run_starts(tiny: TinyRun) -> None:
    found: dict[str, Any] = {}

    class Reads(Everywhere):
        @hookimpl
        def check_runtime(self, run: Any, preflight: Any) -> list[Any]:
            found["before"] = run.facts()
            return []

        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            found["later"] = run.facts()

    tiny("run", plugins=[Reads()], training__mixed_precision="bf16")
    assert found["before"] == {"precision": "bf16", "precision_why": "configured"}
    assert found["later"].items() >= found["before"].items()
