"""State of plugins: what comes back is what was saved, and what has no owner is not lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt_simple import Config, Plugin
from gpt_simple.errors import CheckpointError, PluginError
from gpt_simple.plugin_host.host import PluginHost
from gpt_simple.plugin_host.state import pack, unpack

Activate = Callable[..., PluginHost]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: "$" not in key), inner),
    max_leaves=20,
)


@given(VALUES)
def test_json_values_come_back_as_they_were(value: Any) -> None:
    document = json.loads(json.dumps(pack(value, "p", {}), allow_nan=False))
    assert unpack(document, {}) == value


def test_tensors_and_odd_floats_come_back_at_any_depth() -> None:
    state = {"a": [torch.arange(3), {"b": torch.zeros(2)}], "nan": math.nan, "low": -math.inf}
    tensors: dict[str, torch.Tensor] = {}
    document = json.loads(json.dumps(pack(state, "p", tensors), allow_nan=False))
    assert sorted(tensors) == ["p/a/0", "p/a/1/b"]
    back = unpack(document, tensors)
    assert torch.equal(back["a"][0], torch.arange(3))
    assert torch.equal(back["a"][1]["b"], torch.zeros(2))
    assert math.isnan(back["nan"])
    assert back["low"] == -math.inf


@pytest.mark.parametrize("value", [{1: 2}, {"a": {1, 2}}, object(), {"$tensor": "x"}, b"bytes"])
def test_what_cannot_be_kept_is_refused_by_its_path(value: object) -> None:
    with pytest.raises(PluginError, match="the state's p"):
        pack(value, "p", {})


class Counter(Plugin):
    """Counts and keeps a tensor; remembers what it was given."""

    ranks = "all"
    state_version = 2

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.state: dict[str, Any] = {"count": 3, "ema": torch.ones(2)}
        self.loaded: tuple[Any, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any, version: int) -> None:
        self.loaded = dict(state), version


def ready(host: PluginHost) -> PluginHost:
    host.instantiate(Config())
    host.calls(True, lambda *failure: None)
    return host


def named(name: str, base: type[Plugin] = Counter, **declared: Any) -> type[Plugin]:
    return type(name, (base,), declared)


def test_state_finds_its_way_back_with_its_version(activate: Activate) -> None:
    records, tensors = ready(activate(Counter)).state()
    host = ready(activate(Counter))
    host.load_state(json.loads(json.dumps(records)), tensors)
    state, version = host.plugins[0].instance.loaded
    assert (state["count"], version) == (3, 2)
    assert torch.equal(state["ema"], torch.ones(2))


def test_tensors_come_back_on_the_device_where_they_were(activate: Activate) -> None:
    """Tensors of a device that this torch lacks are fake: they have a device and no values."""
    host = ready(activate(Counter))
    with FakeTensorMode():
        host.plugins[0].instance.state = {"ema": torch.ones(2, device="cuda:0"), "seen": [torch.ones(3)]}
        records, tensors = host.state()
        kept = {path: tensor.cpu() for path, tensor in tensors.items()}
        again = ready(activate(Counter))
        again.load_state(json.loads(json.dumps(records)), kept, device=torch.device("cuda", 1))
        state, _ = again.plugins[0].instance.loaded
        assert [str(state["ema"].device), str(state["seen"][0].device)] == ["cuda:1", "cpu"]
        again.load_state(records, kept, device=torch.device("cpu"))
        assert again.plugins[0].instance.loaded[0]["ema"].is_cpu


def test_a_record_of_host_tensors_is_as_before(activate: Activate) -> None:
    records, _ = ready(activate(Counter)).state()
    assert records["counter"].keys() == {"version", "required", "distribution", "distribution_version", "state"}


def test_a_plugin_without_state_leaves_no_record(activate: Activate) -> None:
    assert ready(activate(named("Empty", Plugin))).state() == ({}, {})


def test_state_of_a_missing_plugin_is_carried_forward(activate: Activate) -> None:
    records, tensors = ready(activate(Counter)).state()
    without = ready(activate())
    without.load_state(records, tensors)
    later_records, later_tensors = without.state()
    assert later_records == records
    assert later_tensors.keys() == tensors.keys()


def test_state_that_is_required_is_not_dropped_in_silence(activate: Activate) -> None:
    records, tensors = ready(activate(named("Vital", state_required=True))).state()
    records["vital"] |= {"distribution": "acme-vital", "distribution_version": "1.2"}
    with pytest.raises(CheckpointError, match=r"'vital'.*-p vital.*pip install acme-vital==1.2"):
        ready(activate()).load_state(records, tensors)


def test_a_plugin_without_a_package_has_no_advice_to_install_it(activate: Activate) -> None:
    records, tensors = ready(activate(named("Vital", state_required=True))).state()
    with pytest.raises(
        CheckpointError, match=r"must not go on: pass it again, with -p ./vital.py or plugins="
    ) as caught:
        ready(activate()).load_state(records, tensors)
    assert "install" not in str(caught.value)


def test_a_renamed_plugin_finds_its_state(activate: Activate) -> None:
    records, tensors = ready(activate(Counter)).state()
    host = ready(activate(named("Renamed", aliases=("counter",))))
    host.load_state(records, tensors)
    assert host.plugins[0].instance.loaded[0]["count"] == 3
    assert host.state()[0].keys() == {"renamed"}


def test_other_processes_restore_only_plugins_of_all_ranks(activate: Activate) -> None:
    host = ready(activate(Counter, named("Mine", ranks="main")))
    records, tensors = host.state()
    host.load_state(records, tensors, is_main=False)
    assert {plugin.name: plugin.instance.loaded is not None for plugin in host.plugins} == {
        "counter": True,
        "mine": False,
    }


def test_a_checkpoint_is_not_lost_to_a_logger_that_cannot_save(activate: Activate) -> None:
    class Bad(Plugin):
        def state_dict(self) -> dict[str, Any]:
            raise ValueError

    class Odd(Plugin):
        def state_dict(self) -> dict[str, Any]:
            return {"a": object()}

    host = ready(activate(Bad, Odd, Counter))
    assert host.state()[0].keys() == {"counter"}
    assert [plugin.failed for plugin in host.plugins] == [True, False, True]


def test_keys_that_look_like_paths_do_not_meet(activate: Activate) -> None:
    state = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a~1b": torch.full((1,), 2.0)}
    tensors: dict[str, torch.Tensor] = {}
    back = unpack(json.loads(json.dumps(pack(state, "p", tensors))), tensors)
    assert [back["a/b"].item(), back["a"]["b"].item(), back["a~1b"].item()] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("garbage", [[1, 2], "text", 3, None, {"a": {1, 2}}], ids=repr)
def test_state_that_cannot_be_saved_is_a_failure_of_its_plugin(activate: Activate, garbage: Any) -> None:
    odd = named("Odd", Plugin, state_dict=lambda self: garbage)
    host = ready(activate(odd, Counter))
    assert host.state()[0].keys() == {"counter"}
    assert [plugin.failed for plugin in host.plugins] == [False, True]
    odd.on_error = "abort"
    with pytest.raises(PluginError, match=r"plugin odd \(.*test_state.py\) failed in state_dict: .*expected"):
        ready(activate(odd)).state()


class Fragile(Counter):
    """As Counter, but switched off when it fails; its state can change in place, as an average of weights does."""

    on_error = "disable"
    aliases = ("counter",)


@pytest.mark.parametrize("saved_under", ["counter", "fragile"])
def test_a_switched_off_plugin_keeps_its_last_good_state(activate: Activate, saved_under: str) -> None:
    records, tensors = ready(activate(named(saved_under.title(), Fragile, aliases=()))).state()
    host = ready(activate(Fragile))
    host.load_state(records, tensors)
    plugin = host.plugins[0]
    for count in (3, 4):  # as it was loaded, then as it was saved
        plugin.failed = True
        plugin.instance.state["count"] = count + 1
        plugin.instance.state["ema"].add_(1)
        later = ready(activate(Fragile))
        later.load_state(*host.state())
        state, _ = later.plugins[0].instance.loaded
        assert (state["count"], state["ema"].tolist()) == (count, [count - 2.0] * 2)
        plugin.failed = False
        host.state()


def test_state_that_cannot_be_taken_back_ends_the_run(activate: Activate) -> None:
    class Bad(Plugin):
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state: Any, version: int) -> None:
            raise KeyError("b")

    host = ready(activate(Bad))
    with pytest.raises(PluginError, match=r"plugin bad .*failed in load_state_dict: KeyError"):
        host.load_state(*host.state())
