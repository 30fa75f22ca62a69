"""What plugins cost: one call of a hook, and ten idle plugins in every step of a real run.

    python benchmarks/plugins.py [--packages 100]

Reported as JSON: microseconds of a call with one and with ten listeners beside pluggy's own call, with and without the
guard of torch's global state; the share of a step of a tiny model that the machinery takes with ten plugins that listen
to every hook of the step and do nothing; and `plugins list` with many more packages installed.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpt_simple import Config, Plugin, hookimpl
from gpt_simple.engine.guard import keeps_torch_state
from gpt_simple.hooks import MetricsReady
from gpt_simple.hooks.activation import Switches
from gpt_simple.hooks.discovery import DEFAULT_ON
from gpt_simple.hooks.host import PluginHost
from gpt_simple.testing import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--packages", type=int, default=100)
arguments = parser.parse_args()

RUN = SimpleNamespace()
EVENT = MetricsReady(1, 1, {})


class Idle(Plugin[Any]):
    """Listens to all hooks of a step and does nothing."""

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


def microseconds(call: Callable[[], Any]) -> float:
    return round(1e6 * min(timeit.repeat(call, number=20_000, repeat=7)) / 20_000, 3)


def one_call(listeners: int) -> dict[str, float]:
    def host(guarded: bool) -> PluginHost:
        switches = Switches(disable=tuple(DEFAULT_ON))
        made = PluginHost.activate({}, set_keys=lambda key: False, switches=switches, extra=idle(listeners))
        made.wrap = keeps_torch_state if guarded else None
        made.instantiate(Config())
        return made

    plain = host(guarded=False)
    bare = plain.calls(True, print).on_metrics
    guarded = host(guarded=True).calls(True, print).on_metrics
    relay = plain._manager.hook.on_metrics
    assert bare is not None
    assert guarded is not None
    return {
        "call": microseconds(lambda: bare(RUN, EVENT)),
        "guarded call": microseconds(lambda: guarded(RUN, EVENT)),
        "pluggy": microseconds(lambda: relay(run=RUN, event=EVENT)),
    }


def share_of_a_step() -> dict[str, float]:
    """From the host's own clock: what the plugins took of the time of a run's steps."""
    steps = 400
    overrides = {
        "model.n_embd": 64,
        "model.n_layer": 2,
        "data.max_length": 64,
        "training.per_device_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.eval_steps": None,
        "training.save_steps": None,
    }
    alone, crowded = [], []
    for _ in range(3):
        for plugins, times in (([], alone), (idle(10), crowded)):
            started = time.perf_counter()
            train(*plugins, max_steps=steps, overrides=overrides)
            times.append(1e3 * (time.perf_counter() - started) / steps)
    return {
        "step_ms": round(min(alone), 3),
        "with_ten_idle_plugins_ms": round(min(crowded), 3),
        "share": round(min(crowded) / min(alone) - 1, 4),
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
