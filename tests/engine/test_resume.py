"""What a resume guarantees."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_simple import CheckpointError, Config
from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.config.schema import Phase, PluginsConfig
from gpt_simple.data.mixture import mixture
from gpt_simple.engine.resume import FoundCheckpoint, resume_guarantee, run_fingerprint, why_finished, with_determinism

SAVED: dict[str, Any] = {
    "config": {
        "data.seed": None,
        "training.seed": 1,
        "training.max_steps": 4,
        "data.curriculum": [],
        "data.max_length": 8,
        "data.on_exhaustion": "repeat",
    },
    "data": {"tokenizer": "t"},
    "numerics": {"processes": 2},
    "plugins": {"plugins.noise": "noise 1.0", "plugins.noise.scale": 0.1},
}


def now(processes: int = 2, **config: Any) -> dict[str, Any]:
    changed = {key.replace("__", "."): value for key, value in config.items()}
    return {**SAVED, "config": {**SAVED["config"], **changed}, "numerics": {"processes": processes}}


AHEAD = " (the curriculum up to here is the same: nothing comes twice or is left out)"
READ = " (where a bucket has been read to its end before, the order of samples is another from here on)"
ORDER = " (the order of samples is another from here on: some come twice, others not at all)"


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (now(), "bit-exact"),
        (now(1), "order-exact: same samples, other last digits (processes 2 -> 1)"),
        (
            now(training__parallel="fsdp") | {"numerics": {"processes": 2, "parallel": "fsdp"}},
            "order-exact: same samples, other last digits (parallel ddp -> fsdp)",
        ),
        (now(training__max_steps=6), "changed: training.max_steps 4 -> 6"),
        (now(1, training__max_steps=6), "changed: training.max_steps 4 -> 6; processes 2 -> 1"),
        (now(training__seed=2), f"changed: training.seed 1 -> 2{ORDER}"),
        (now(data__seed=1), "changed: data.seed None -> 1"),
        (now(training__warmup_stages=[{"steps": 2}]), "changed: training.warmup_stages None -> [{'steps': 2}]"),
        (
            now(data__curriculum=[{"duration_tokens": 8, "mix": {"a": 1.0}}]),
            f"changed: data.curriculum [] -> [{{'duration_tokens': 8, 'mix': {{'a': 1.0}}}}]{ORDER}",
        ),
    ],
)
def test_every_difference_is_in_the_guarantee(later: dict[str, Any], expected: str) -> None:
    assert resume_guarantee(SAVED, later, 100) == expected


ANY = "kernels of NVIDIA H100 add in any order without training.deterministic"


@pytest.mark.parametrize(
    ("device", "before", "after", "expected"),
    [
        ("cpu", None, None, "bit-exact"),
        ("cpu", None, True, "order-exact: same samples, other last digits (deterministic False -> True)"),
        ("cpu", True, True, "bit-exact"),
        ("NVIDIA H100", False, False, f"order-exact: same samples, other last digits ({ANY})"),
        ("NVIDIA H100", None, False, f"order-exact: same samples, other last digits ({ANY})"),
        ("NVIDIA H100", True, False, f"order-exact: same samples, other last digits ({ANY})"),
        ("NVIDIA H100", None, True, "order-exact: same samples, other last digits (deterministic False -> True)"),
        ("NVIDIA H100", True, True, "bit-exact"),
    ],
)
def test_a_gpu_repeats_its_bits_only_if_it_is_asked_to(
    device: str, before: bool | None, after: bool | None, expected: str
) -> None:
    def launch(value: bool | None) -> dict[str, Any]:
        numerics = {"processes": 2, "device": device}
        numerics |= {} if value is None else with_determinism(numerics, value)
        return {**now(training__deterministic=bool(value)), "numerics": numerics}

    assert resume_guarantee(launch(before), launch(after), 100) == expected
    longer = launch(after)
    longer["config"]["training.max_steps"] = 6
    turned = f"; deterministic {bool(before)} -> {after}" if after is not None and bool(before) != after else ""
    assert resume_guarantee(launch(before), longer, 100) == f"changed: training.max_steps 4 -> 6{turned}"


FINISHED = "the run was completed at step 2 of 4 (enough): raise training.max_steps, or change the options"


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (now(), FINISHED),
        (now(1, training__seed=2, data__path="elsewhere", data__num_workers=3), FINISHED),
        (now() | {"plugins": {"plugins.noise": "noise 2.0", "plugins.noise.scale": 0.1}}, FINISHED),
        (now(training__max_steps=2), "step 2 of 2 was reached before: raise training.max_steps"),
        (now(training__max_steps=3), FINISHED.replace("of 4", "of 3")),
        (now(training__max_steps=5), ""),
        (now(data__on_exhaustion="halt"), ""),
        (now() | {"plugins": {"plugins.noise": "noise 1.0", "plugins.noise.scale": 0.2}}, ""),
        (now() | {"plugins": {"plugins.noise": "louder 1.0", "plugins.noise.scale": 0.1}}, ""),
        (now() | {"plugins": {}}, ""),
    ],
)
def test_what_lets_a_run_go_on_that_a_plugin_finished(later: dict[str, Any], expected: str) -> None:
    store, checkpoint = Store(Path("none")), Checkpoint(2, Path("none/step-00000002"))
    why = why_finished(FoundCheckpoint(store, checkpoint, {"finished": "enough", "run": SAVED}), later)
    assert why.partition(" of a plugin")[0] == expected
    of_older_version = why_finished(FoundCheckpoint(store, checkpoint, {"run": SAVED}), later)
    assert of_older_version == (expected if expected.startswith("step") else "")
    assert why_finished(FoundCheckpoint(store), later) == ""


def phases(*phases: tuple[int, dict[str, float]], **config: Any) -> dict[str, Any]:
    """A launch with a curriculum of (samples, mix)."""
    return now(data__curriculum=[{"duration_tokens": 8 * count, "mix": mix} for count, mix in phases], **config)


A, B, C = {"a": 1.0}, {"a": 1.0, "b": 1.0}, {"b": 1.0}


@pytest.mark.parametrize(
    ("saved", "later", "note"),
    [
        (phases((60, A), (90, B), (1, C)), phases((60, A), (41, B), (1, A)), AHEAD),
        (phases((60, A), (90, B), (1, C)), phases((60, A), (39, B), (1, A)), ORDER),
        (phases((60, A), (90, B), (1, C)), phases((59, A), (90, B), (1, C)), ORDER),
        (phases((60, A), (90, B)), phases((60, A), (90, C)), ORDER),
        (phases((1, A)), phases((100, A), (1, B)), AHEAD),
        (phases((1, A)), phases((99, A), (1, B)), ORDER),
        (phases((1, A)), now(), ORDER),
        (phases((1, A)), phases((1, A), data__on_exhaustion="halt"), ""),
        (phases((1, A)), phases((1, A), data__on_exhaustion="renormalise"), READ),
        (now(), now(data__on_exhaustion="renormalise"), ""),
    ],
)
def test_a_changed_curriculum_notes_the_order_of_samples(
    saved: dict[str, Any], later: dict[str, Any], note: str
) -> None:
    guarantee = resume_guarantee(saved, later, 100)
    assert guarantee.startswith("changed: data.")
    assert guarantee.endswith(note)
    assert (" (" in guarantee) == bool(note)


def test_samples_have_the_same_order_where_the_note_says_so() -> None:
    buckets, rng = {"a": 300, "b": 300}, random.Random(5)

    def some() -> list[tuple[int, dict[str, float]]]:
        return [(rng.choice([40, 60, 100]), rng.choice([A, B, C])) for _ in range(rng.choice([1, 2, 3]))]

    kept = 0
    for _ in range(200):
        old, new = some(), some()
        first = [
            mixture(buckets, [Phase(8 * count, mix) for count, mix in each], "repeat", max_length=8, seed=1)
            .locate(np.arange(100))
            .tolist()
            for each in (old, new)
        ]
        guarantee = resume_guarantee(phases(*old), phases(*new), 100)
        if guarantee.endswith(AHEAD):
            kept += 1
            assert first[0] == first[1]
    assert kept > 5


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (
            {"data__max_documents": 9, "data__num_workers": 2},
            ["data.max_documents None -> 9", "tokenizer fingerprint t -> u"],
        ),
        (
            {"training__seed": 2},
            ["tokenizer fingerprint t -> u", "the configuration is the same: the files are others"],
        ),
    ],
)
def test_other_data_are_refused_with_the_changed_options(config: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(CheckpointError, match="of another model, tokenizer or data set") as refused:
        resume_guarantee(SAVED, now(**config) | {"data": {"tokenizer": "u"}}, 100)
    assert str(refused.value).splitlines()[1:-1] == [f"  {line}" for line in lines]


def test_a_foreign_plugin_may_change_training() -> None:
    """A plugin of another package, its version, its options and its absence count; a built-in one does not."""

    def launched(scale: float, **plugins: str) -> dict[str, Any]:
        tables = {"noise": {"scale": scale}, "console": {"progress": str(scale)}}
        config = Config(plugins=PluginsConfig(tables=tables))
        active = plugins | {"console": "gpt-simple-trainer 0.1.0"}
        return run_fingerprint(config, data={}, numerics={}, plugins=active)

    saved = launched(0.1, noise="noise 1.0")
    assert resume_guarantee(saved, launched(0.1, noise="noise 1.0"), 100) == "bit-exact"
    assert resume_guarantee(saved, launched(0.2, noise="noise 1.0"), 100) == "changed: plugins.noise.scale 0.1 -> 0.2"
    assert (
        resume_guarantee(saved, launched(0.1, noise="noise 1.1"), 100)
        == "changed: plugins.noise noise 1.0 -> noise 1.1"
    )
    gone = resume_guarantee(saved, launched(0.1), 100)
    assert gone == "changed: plugins.noise noise 1.0 -> None; plugins.noise.scale 0.1 -> None"
    assert resume_guarantee(launched(0.1), launched(0.1, noise=""), 100).startswith("changed: plugins.noise None -> on")
