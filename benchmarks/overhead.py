"""Overhead of the engine per optimizer step, against a bare PyTorch loop in the same process.

The model is tiny (2 layers, 64 wide, rows of 64 tokens, batch 4), so a step takes milliseconds and overhead shows. All
default plugins are on. A plugin alternates: after every block of engine steps it runs a block of bare steps with a copy
of the same model, the same rows, fused AdamW, clipping and schedule. The bare loop gets its rows as ready tensors, so
the engine's loader counts as overhead.

A machine's speed drifts by more than the overhead. So blocks are short, and the result is the median of the differences
between neighbouring blocks.

    python benchmarks/overhead.py [--blocks 300] [--block-steps 20] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from typing import Any

import torch

import gpt_simple
from gpt_simple import Plugin, hookimpl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--blocks", type=int, default=300)
parser.add_argument("--block-steps", type=int, default=20)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--logging-steps", type=int, default=10)
arguments = parser.parse_args()


Times = tuple[float, float]


def clocks() -> Times:
    """Wall time, and CPU time of this thread, which does not count other load on the machine."""
    return time.perf_counter(), time.thread_time()


def per_step(before: Times, after: Times) -> Times:
    """Microseconds per step of a block."""
    wall, cpu = (1e6 * (end - start) / arguments.block_steps for start, end in zip(before, after, strict=True))
    return wall, cpu


Row = tuple[torch.Tensor, torch.Tensor, int]


class Rows(Plugin[Any]):
    """Keeps the first batches of a run."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rows: list[Row] = []

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        batch = event.batch
        self.rows.append((batch.input_ids.clone(), batch.labels.clone(), batch.targets))


class Turns(Plugin[Any]):
    """Times blocks of the engine's steps and runs a bare block after each."""

    after = ("console", "metrics", "throughput", "evaluate", "checkpoint", "sample")
    on_error = "abort"

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(None)
        self.rows = rows
        self.engine: list[Times] = []
        self.bare: list[Times] = []

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.model = copy.deepcopy(run.model)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
        self.parameters = parameters

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step % arguments.block_steps:
            return
        now = clocks()
        if event.step > arguments.block_steps:  # the first block warms up
            self.engine.append(per_step(self.started, now))
            before = clocks()
            self._bare_block()
            self.bare.append(per_step(before, clocks()))
        else:
            self._bare_block()
        self.started = clocks()

    def _bare_block(self) -> None:
        for step, (inputs, labels, targets) in enumerate(self.rows):
            loss = self.model(inputs, labels) / targets
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            rate = 3e-4 * (0.1 + 0.9 * 0.5 * (1 + step / 1e9))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def train(plugin: Plugin[Any], max_steps: int) -> gpt_simple.TrainResult:
    """The tiny run, with the default plugins and one more."""
    with tempfile.TemporaryDirectory() as directory:
        return gpt_simple.train(
            model={"n_embd": 64, "n_layer": 2, "n_head": 2},
            data={"source": "stories", "tokenizer": "bytes", "max_length": 64, "max_documents": 4000},
            training={
                "per_device_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "max_steps": max_steps,
                "compile": False,
                "gradient_checkpointing": False,
                "logging_steps": arguments.logging_steps,
                "eval_steps": None,
                "output_dir": directory,
            },
            overrides={"plugins.console.progress": "lines"},
            plugins=[plugin],
        )


def main() -> None:
    torch.set_num_threads(arguments.threads)
    rows = Rows()
    train(rows, arguments.block_steps)
    turns = Turns(rows.rows)
    result = train(turns, arguments.block_steps * (arguments.blocks + 1))
    report: dict[str, Any] = {}
    for index, clock in enumerate(("wall", "cpu")):
        pairs = [(engine[index], bare[index]) for engine, bare in zip(turns.engine, turns.bare, strict=True)]
        overhead = sorted(engine - bare for engine, bare in pairs)
        report[clock] = {
            "bare_step_us": round(statistics.median(bare for _, bare in pairs), 1),
            "engine_step_us": round(statistics.median(engine for engine, _ in pairs), 1),
            "overhead_us_quartiles": [round(cut, 1) for cut in statistics.quantiles(overhead, n=4)],
            "ratio_median": round(statistics.median(engine / bare for engine, bare in pairs), 4),
        }
    report |= {
        "plugin_us_per_step": {
            name: round(1e6 * seconds / result.steps, 2) for name, seconds in result.summary["plugin_seconds"].items()
        },
    }
    print(json.dumps(report, indent=1))


main()
