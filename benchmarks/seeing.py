"""What it costs to see a run: the share of the time of a run that goes into showing and recording it.

A tiny model (2 layers, 64 wide, rows of 64 tokens, batch 4), so that a step takes milliseconds, with a logging boundary
every 10 steps, the live view, metrics.jsonl and W&B offline. Hooks are timed where the engine calls them, and what they
take once, such as starting W&B, is told apart by a short and a long run. A redraw of the view, which happens once a
second in a thread, is timed by itself. Shares suffer less from a busy machine than a comparison of two runs does.

    python benchmarks/seeing.py [--steps 2000] [--threads 1]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import sys
import tempfile
import threading
import time

import torch
from rich.console import Console as Terminal

import gpt_simple
from gpt_simple.hooks import RunStart
from gpt_simple.plugins.console_live import LiveView

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--threads", type=int, default=1)
arguments = parser.parse_args()

SEEING = ("console", "metrics", "throughput", "wandb")


def main() -> None:
    torch.set_num_threads(arguments.threads)
    short, long = arguments.steps // 4, arguments.steps
    (before, _), (after, rate) = _seconds(short), _seconds(long)
    per_step = {name: (after[name] - before[name]) / (long - short) for name in SEEING}
    step, redraw = 256 / rate, _redraw()
    report = {
        "step_us": round(1e6 * step),
        "us_a_step": {name: round(1e6 * seconds, 1) for name, seconds in per_step.items()},
        "start_seconds": {name: round(after[name] - per_step[name] * long, 2) for name in SEEING},
        "redraw_ms": round(1e3 * redraw, 2),
        "share": round(sum(per_step.values()) / step + redraw, 4),
    }
    print(json.dumps(report))


def _seconds(steps: int) -> tuple[dict[str, float], float]:
    """What each plugin took in a run of so many steps, and the run's tokens a second."""
    # A terminal that somebody reads, or its buffer would fill and the view block.
    controller, terminal = pty.openpty()
    threading.Thread(target=_drain, args=(controller,), daemon=True).start()
    here, sys.stdout = sys.stdout, os.fdopen(terminal, "w")
    with tempfile.TemporaryDirectory() as directory:
        result = gpt_simple.train(
            model={"n_embd": 64, "n_layer": 2, "n_head": 4},
            data={"source": "stories", "tokenizer": "bytes", "max_length": 64},
            training={
                "max_steps": steps,
                "per_device_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "compile": False,
                "gradient_checkpointing": False,
                "logging_steps": 10,
                "eval_steps": None,
                "save_steps": None,
                "output_dir": directory,
                "wandb_project": "benchmark",
            },
            overrides={"plugins.wandb.mode": "offline", "plugins.console.progress": "live"},
        )
    sys.stdout = here
    return {name: result.summary["plugin_seconds"][name] for name in SEEING}, float(result.tokens_per_second or 0)


def _redraw() -> float:
    """Seconds to draw the view once."""
    start = RunStart(step=0, max_steps=1000, tokens=0, resumed_from=None, promise="", facts={"floor": 1.0})
    terminal = Terminal(file=io.StringIO(), width=120, force_terminal=True)
    view = LiveView(start, lambda: 60.0, terminal=terminal)
    for number in range(40):
        view.metrics({"train/loss": 3.0 - number / 40, "train/lr": 1e-3, "perf/tokens_per_second": 1e4})
    view.evaluation({"eval/loss": 2.0, "eval/bits_per_byte": 1.0}, 2.0)
    begun = time.perf_counter()
    for _ in range(50):
        terminal.print(view)
    return (time.perf_counter() - begun) / 50


def _drain(descriptor: int) -> None:
    while os.read(descriptor, 65536):
        pass


if __name__ == "__main__":
    main()
