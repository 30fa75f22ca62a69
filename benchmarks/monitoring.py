"""Cost of monitoring a run, and of reporting on a long one.

Runs with everything on alternate with runs with everything off, in one process (on-off-off-on). On are the live view on
a terminal, redrawn once a second, metrics.jsonl, throughput, W&B offline, TensorBoard if `gpt-simple-tensorboard` is
installed, and a logging boundary every 10 steps. Off are all of these plugins and the logging boundary. Each run is
timed from its 20th step to its last. `ratio` is tokens/s on over tokens/s off: the quartiles over the pairs.

A machine's speed drifts by more than the difference, so a second figure does not compare runs. `share` is the part of a
step's time that the plugins' hooks take, timed where the engine calls them and without their one-time cost, plus one
redraw of the view a second, timed separately.

    python benchmarks/monitoring.py [--model tiny|10m] [--steps N] [--pairs N] [--threads 1]
    python benchmarks/monitoring.py --report
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console as Terminal

import gpt_simple
from gpt_simple import Plugin, hookimpl
from gpt_simple.hooks import RunStart, StepEnd
from gpt_simple.plugins.console_live import LiveView

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", choices=("tiny", "10m"), default="tiny", help="a step of about 6 ms, or 12 M parameters")
parser.add_argument("--steps", type=int, help="steps of a run; unset: 1000 of the tiny model, 40 of the large one")
parser.add_argument("--pairs", type=int, help="pairs of runs; unset: 6 of the tiny model, 3 of the large one")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--report", action="store_true", help="time `gpt-simple report` on 100,000 logged steps instead")
arguments = parser.parse_args()

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "model": {"n_embd": 64, "n_layer": 2, "n_head": 4},
        "data": {"tokenizer": "bytes", "max_length": 64},
        "training": {"per_device_batch_size": 4, "gradient_accumulation_steps": 1},
    },
    "10m": {
        "model": {"n_embd": 384, "n_layer": 6, "n_head": 6},
        "data": {"tokenizer": "bpe", "tokenizer_vocab_size": 4096, "max_length": 256},
        "training": {"per_device_batch_size": 8, "gradient_accumulation_steps": 2},
    },
}
MONITORING = [
    "console",
    "metrics",
    "throughput",
    "wandb",
    *(["tensorboard"] if find_spec("gpt_simple_tensorboard") else []),
]
WARM_UP = 20


class Stopwatch(Plugin[Any]):
    """Seconds of a step, from the end of the warm-up to the last one."""

    after = tuple(MONITORING)

    def __init__(self) -> None:
        super().__init__(None)
        self.step = 0.0
        self._begun = 0.0

    @hookimpl
    def on_step_end(self, run: Any, event: StepEnd) -> None:
        if event.step == WARM_UP:
            self._begun = time.perf_counter()
        elif event.is_last:
            self.step = (time.perf_counter() - self._begun) / (event.step - WARM_UP)


def main() -> None:
    torch.set_num_threads(arguments.threads)
    steps = arguments.steps or {"tiny": 1000, "10m": 40}[arguments.model]
    pairs = arguments.pairs or {"tiny": 6, "10m": 3}[arguments.model]
    _run(WARM_UP + 1, monitored=True)  # imports, prepared data, W&B's process
    ratios, shares, redraw = [], [], _redraw()
    for pair in range(pairs):
        took = {monitored: _run(steps, monitored) for monitored in ((True, False) if pair % 2 else (False, True))}
        (on, costs), (off, _) = took[True], took[False]
        ratios.append(off / on)
        shares.append((on, costs))
    _, once = _run(WARM_UP + 1, monitored=True)
    per_step = {
        name: statistics.median(costs[name] - once[name] for _, costs in shares) / (steps - WARM_UP)
        for name in MONITORING
    }
    step = statistics.median(seconds for seconds, _ in shares)
    report = {
        "model": arguments.model,
        "step_ms": round(1e3 * step, 2),
        "ratio": [round(cut, 4) for cut in (statistics.quantiles(ratios, n=4) if pairs > 1 else ratios)],
        "share": round(sum(per_step.values()) / step + redraw, 4),
        "us_a_step": {name: round(1e6 * seconds, 1) for name, seconds in per_step.items()},
        "once_seconds": {name: round(seconds, 2) for name, seconds in once.items()},
        "redraw_ms": round(1e3 * redraw, 2),
    }
    print(json.dumps(report))


def _run(steps: int, monitored: bool) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and the seconds that each monitoring plugin took in the whole run."""
    # Drain the terminal: a full buffer would block the view.
    controller, terminal = pty.openpty()
    threading.Thread(target=_drain, args=(controller,), daemon=True).start()
    os.environ |= {"COLUMNS": "120", "LINES": "40"}
    here, sys.stdout = sys.stdout, os.fdopen(terminal, "w")
    stopwatch, shape = Stopwatch(), MODELS[arguments.model]
    training = {"compile": False, "gradient_checkpointing": False, "eval_steps": None, "save_steps": None}
    chosen: dict[str, Any] = {"training.max_steps": steps}
    if monitored:
        chosen |= {"training.logging_steps": 10, "training.wandb_project": "benchmark"}
        chosen |= {"plugins.wandb.mode": "offline", "plugins.console.progress": "live"}
        chosen |= {"plugins.tensorboard.flush_seconds": 30} if "tensorboard" in MONITORING else {}
    else:
        chosen |= {
            "training.logging_steps": "null",
            "plugins.disable": json.dumps(["console", "metrics", "throughput"]),
        }
    try:
        with tempfile.TemporaryDirectory() as directory:
            result = gpt_simple.train(
                model=shape["model"],
                data={"source": "stories", **shape["data"]},
                training={**training, **shape["training"], "output_dir": directory},
                overrides=chosen,
                plugins=[stopwatch],
            )
    finally:
        sys.stdout.close()
        sys.stdout = here
    costs = result.summary["plugin_seconds"]
    return stopwatch.step, {name: costs.get(name, 0.0) for name in MONITORING}


def _redraw() -> float:
    """Seconds to draw the view once."""
    facts = {"floor": 1.0, "compile": "off"}
    start = RunStart(step=0, max_steps=1000, tokens=0, resumed_from=None, promise="", best_val_loss=2.0, facts=facts)
    terminal = Terminal(file=io.StringIO(), width=120, force_terminal=True)
    view = LiveView(start, lambda: 500, lambda: 60.0, terminal=terminal)
    for number in range(40):
        view.metrics({"train/loss": 3.0 - number / 40, "train/lr": 1e-3, "perf/tokens_per_second": 1e4})
    view.evaluation({"eval/loss": 2.0, "eval/bits_per_byte": 1.0})
    begun = time.perf_counter()
    for _ in range(50):
        terminal.print(view)
    return (time.perf_counter() - begun) / 50


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:
        os.close(descriptor)


def report_of_a_long_run() -> None:
    """The files of a real run, with its last rows repeated for 100,000 steps and noise in every number."""
    steps, noise = 100_000, random.Random(0).random
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        gpt_simple.train(
            model={"n_embd": 32, "n_layer": 1, "n_head": 2},
            data={"source": "stories", "tokenizer": "bytes", "max_length": 64, "max_documents": 200},
            optimizer={"warmup_steps": 1},
            training={
                "max_steps": 4,
                "logging_steps": 2,
                "eval_steps": 2,
                "compile": False,
                "gradient_checkpointing": False,
                "output_dir": directory,
            },
            overrides={"plugins.console.progress": "off", "plugins.sample.max_new_tokens": 80},
        )
        metrics = root / "metrics.jsonl"
        rows = {row.get("name", row["kind"]): row for row in map(json.loads, metrics.open())}
        with metrics.open("w") as file:
            for step in range(1, steps + 1):
                for name in ("train", "eval", "sample") if step % 500 == 0 else ("train",):
                    row = rows[name]
                    numbers = {key: value * (0.9 + 0.2 * noise()) for key, value in row.items() if "/" in key}
                    place = {"step": step, "tokens": step * 1024, "time": row["time"] + step}
                    file.write(json.dumps(row | numbers | place) + "\n")
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "gpt_simple", "report", directory], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
        size = (root / "report.html").stat().st_size
        sizes = {"metrics_mb": round(metrics.stat().st_size / 1e6, 1), "report_mb": round(size / 1e6, 3)}
    print(json.dumps({"logged_steps": steps, "seconds": [round(s, 2) for s in sorted(seconds)], **sizes}))


if __name__ == "__main__":
    report_of_a_long_run() if arguments.report else main()
