"""What a resume says that it keeps."""

from __future__ import annotations

from typing import Any

import pytest

from gpt_simple import CheckpointError, Config
from gpt_simple.config.schema import PluginsConfig
from gpt_simple.engine.resume import identity, promise

SAVED: dict[str, Any] = {
    "config": {"data.seed": None, "training.seed": 1, "training.max_steps": 4, "data.curriculum": []},
    "data": {"tokenizer": "t"},
    "numerics": {"processes": 2},
    "plugins": {"plugins.noise": "noise 1.0", "plugins.noise.scale": 0.1},
}


def now(processes: int = 2, **config: Any) -> dict[str, Any]:
    changed = {key.replace("__", "."): value for key, value in config.items()}
    return {**SAVED, "config": {**SAVED["config"], **changed}, "numerics": {"processes": processes}}


ORDER = " (the order of samples is another from here on: some come twice, others not at all)"


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (now(), "bit-exact"),
        (now(1), "order-exact: same samples, other last digits (processes 2 -> 1)"),
        (now(training__max_steps=6), "changed: training.max_steps 4 -> 6"),
        (now(1, training__max_steps=6), "changed: training.max_steps 4 -> 6; processes 2 -> 1"),
        (now(training__seed=2), f"changed: training.seed 1 -> 2{ORDER}"),
        (now(data__seed=1), "changed: data.seed None -> 1"),
        (
            now(data__curriculum=[{"mix": {"a": 1.0}}]),
            f"changed: data.curriculum [] -> [{{'mix': {{'a': 1.0}}}}]{ORDER}",
        ),
    ],
)
def test_every_difference_is_told(later: dict[str, Any], expected: str) -> None:
    assert promise(SAVED, later) == expected


@pytest.mark.parametrize(
    ("config", "told"),
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
def test_other_data_are_refused_with_what_was_asked_for(config: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(CheckpointError, match="of another model, tokenizer or data set") as refused:
        promise(SAVED, now(**config) | {"data": {"tokenizer": "u"}})
    assert str(refused.value).splitlines()[1:-1] == [f"  {line}" for line in told]


def test_a_plugin_of_somebody_else_may_change_what_is_learned() -> None:
    """Another one, another version or other options of it, and it gone; the built-in ones only look."""

    def launched(scale: float, **plugins: str) -> dict[str, Any]:
        tables = {"noise": {"scale": scale}, "console": {"progress": str(scale)}}
        config = Config(plugins=PluginsConfig(tables=tables))
        everybody = plugins | {"console": "gpt-simple-trainer 0.1.0"}
        return identity(config, data={}, numerics={}, plugins=everybody)

    saved = launched(0.1, noise="noise 1.0")
    assert promise(saved, launched(0.1, noise="noise 1.0")) == "bit-exact"
    assert promise(saved, launched(0.2, noise="noise 1.0")) == "changed: plugins.noise.scale 0.1 -> 0.2"
    assert promise(saved, launched(0.1, noise="noise 1.1")) == "changed: plugins.noise noise 1.0 -> noise 1.1"
    gone = promise(saved, launched(0.1))
    assert gone == "changed: plugins.noise noise 1.0 -> None; plugins.noise.scale 0.1 -> None"
    assert promise(launched(0.1), launched(0.1, noise="")).startswith("changed: plugins.noise None -> on")
