"""Cost of plugins: one call of a hook, and ten idle plugins in every step of a real run.

    python benchmarks/plugins.py [--packages 100]

It prints JSON:

- microseconds of a call with one and with ten implementations, beside pluggy's own call, with and without the guard of
  torch's global state
- the share of a step of a tiny model that dispatch takes, with ten plugins that implement every hook of the step and do
  nothing
- `plugins list` with many more packages installed
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from gpt_simple import Config, Plugin, hookimpl
from gpt_simple.engine.process_state import TORCH_STATE
from gpt_simple.hooks import MetricsReady
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.discovery import DEFAULT_ON
from gpt_simple.plugin_host.dispatch import Calls, Guard
from gpt_simple.plugin_host.host import PluginHost
from gpt_simple.testing import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--packages", type=int, default=100)
arguments = parser.parse_args()

RUN = SimpleNamespace(raw=torch.nn.Linear(1, 1))  # the guard checks its mode
EVENT = MetricsReady(1, 1, {})


class Idle(Plugin[Any]):
    """Implements all hooks of a step and does nothing."""

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        pass

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        pass

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        pass

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        pass

    @hookimpl
    def on_metrics(self, run: Any, event: Any) -> None:
        pass


def idle(count: int) -> list[type[Plugin[Any]]]:
    return [type(f"Idle{index}", (Idle,), {}) for index in range(count)]


def microseconds(statement: str, **names: Any) -> float:
    return round(1e6 * min(timeit.repeat(statement, globals=names, number=20_000, repeat=25)) / 20_000, 3)


def one_call(listeners: int) -> dict[str, float]:
    def host(guarded: bool) -> PluginHost:
        switches = Switches(disable=tuple(DEFAULT_ON))
        made = PluginHost.activate({}, set_keys=lambda key: False, switches=switches, extra=idle(listeners))
        made.guard = TORCH_STATE if guarded else Guard()
        made.instantiate(Config())
        return made

    plain = host(guarded=False)
    bare = plain.calls(True, print).on_metrics
    guarded = host(guarded=True).calls(True, print).on_metrics
    relay = plain._manager.hook.on_metrics
    assert bare is not None
    assert guarded is not None
    return {
        "call": microseconds("call(run, event)", call=bare, run=RUN, event=EVENT),
        "guarded call": microseconds("call(run, event)", call=guarded, run=RUN, event=EVENT),
        "pluggy": microseconds("call(run=run, event=event)", call=relay, run=RUN, event=EVENT),
    }


def share_of_a_step() -> dict[str, float]:
    """The time that ten idle plugins add to the hooks of a step, beside the time of the steps of the same run.

    Three kinds of steps alternate in one run, because two runs differ by more than this time: with the plugins, without
    the guard, without the plugins. The recorder of the test kit is on in all of them. Medians in microseconds.
    """
    hooks = ("on_step_start", "on_batch", "on_gradients", "on_step_end")
    overrides = {
        "model.n_embd": 64,
        "model.n_layer": 2,
        "data.max_length": 64,
        "training.per_device_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.eval_steps": None,
        "training.save_steps": None,
    }
    spent: list[float] = [0.0]
    ends: list[float] = []

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def clocked(run: Any, event: Any) -> None:
            start = time.perf_counter()
            call(run, event)
            spent[-1] += time.perf_counter() - start

        return clocked

    def clocked_calls(host: PluginHost, *arguments: Any, **options: Any) -> Calls:
        calls = calls_of(host, *arguments, **options)
        callers = [calls._callers[name] for name in hooks]
        all_impls = [caller.impls for caller in callers]
        others = [tuple(impl for impl in impls if not impl[1].name.startswith("idle")) for impls in all_impls]
        kinds = [(all_impls, TORCH_STATE), (all_impls, Guard()), (others, TORCH_STATE)]
        for name in hooks:
            setattr(calls, name, timed(getattr(calls, name)))
        last = calls.on_step_end
        assert last is not None

        def end_of_step(run: Any, event: Any) -> None:
            last(run, event)
            ends.append(time.perf_counter())
            spent.append(0.0)
            listening, guard = kinds[len(ends) % 3]
            for caller, impls in zip(callers, listening, strict=True):
                caller.impls, caller.guard = impls, guard

        calls.on_step_end = end_of_step
        return calls

    calls_of = PluginHost.calls
    with patch.object(PluginHost, "calls", clocked_calls):
        train(*idle(10), max_steps=4500, overrides=overrides)
    step = statistics.median(end - start for start, end in pairwise(ends[30:]))
    guarded, unguarded, without = (statistics.median(spent[30 + kind : -1 : 3]) for kind in range(3))
    return {
        "step_us": round(1e6 * step),
        "ten_idle_us": round(1e6 * (guarded - without), 1),
        "of_which_the_guard_us": round(1e6 * (guarded - unguarded), 1),
        "share": round((guarded - without) / step, 4),
    }


def list_with_packages(count: int) -> float:
    with tempfile.TemporaryDirectory() as site:
        for index in range(count):
            info = Path(site) / f"extra_{index}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: extra-{index}\nVersion: 1.0\nSummary: X.\n")
            if index % 10 == 0:
                (info / "entry_points.txt").write_text(f"[gpt_simple.plugins]\nextra{index} = m:X\n")
        program = Path(sys.executable).with_name("gpt-simple")
        times = []
        for _ in range(15):
            started = time.perf_counter()
            subprocess.run(
                [program, "plugins", "list"], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": site}
            )
            times.append(1e3 * (time.perf_counter() - started))
        return round(statistics.median(times), 1)


print(
    json.dumps(
        {
            "one_listener_us": one_call(1),
            "ten_listeners_us": one_call(10),
            "ten_idle_plugins": share_of_a_step(),
            f"plugins_list_ms_with_{arguments.packages}_more_packages": list_with_packages(arguments.packages),
        },
        indent=1,
    )
)
