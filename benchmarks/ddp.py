"""Overhead of the engine per optimizer step on several processes, against bare DDP with the same model.

The model has 10.6 million parameters (6 layers, 384 wide). Rows have 128 tokens, the batch is 4 on each of 2 processes,
the backend is gloo. All default plugins are on. As in overhead.py a plugin alternates: after every block of engine
steps each process runs a block of bare steps with a DDP copy of the model, the same rows, fused AdamW and clipping.

    torchrun --nproc_per_node 2 benchmarks/ddp.py [--blocks 10] [--block-steps 4]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gpt_simple
from gpt_simple import Plugin, hookimpl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--blocks", type=int, default=10)
parser.add_argument("--block-steps", type=int, default=4)
parser.add_argument("--threads", type=int, default=1)
arguments = parser.parse_args()


class Turns(Plugin[Any]):
    """Times blocks of the engine's steps and runs a bare block after each."""

    ranks = "all"
    after = ("console", "metrics", "throughput", "evaluate", "checkpoint", "sample")
    on_error = "abort"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rows: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self.engine: list[float] = []
        self.bare: list[float] = []
        self.cpu: list[float] = []

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.model = DistributedDataParallel(
            copy.deepcopy(run.model), gradient_as_bucket_view=True, broadcast_buffers=False
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        if len(self.rows) < arguments.block_steps:
            batch = event.batch
            self.rows.append((batch.input_ids.clone(), batch.labels.clone(), batch.targets))

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step % arguments.block_steps:
            return
        now, cpu = time.perf_counter(), time.process_time()
        bare = self._bare_block()
        if event.step > arguments.block_steps:  # the first block warms up
            self.engine.append((now - self.started) / arguments.block_steps)
            self.bare.append(bare / arguments.block_steps)
            self.cpu.append((cpu - self.started_cpu) / (time.process_time() - cpu))
        dist.barrier()
        self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def _bare_block(self) -> float:
        dist.barrier()
        started = time.perf_counter()
        for inputs, labels, targets in self.rows:
            loss = self.model(inputs, labels) / targets
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(arguments.threads)
    turns = Turns(None)
    directory = os.path.join(tempfile.gettempdir(), f"gpt-simple-ddp-{os.environ['MASTER_PORT']}")
    result = gpt_simple.train(
        model={"n_embd": 384, "n_layer": 6, "n_head": 6},
        data={"source": "stories", "tokenizer": "bytes", "max_length": 128, "max_documents": 2000},
        training={
            "per_device_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": arguments.block_steps * (arguments.blocks + 1),
            "compile": False,
            "gradient_checkpointing": False,
            "eval_steps": None,
            "save_steps": None,
            "output_dir": directory,
        },
        overrides={"plugins.console.progress": "lines"},
        plugins=[turns],
        force=True,
    )
    pairs = list(zip(turns.engine, turns.bare, strict=True))
    ratios = sorted(engine / bare for engine, bare in pairs)
    if int(os.environ["RANK"]) == 0:
        report = {
            "parameters": sum(parameter.numel() for parameter in turns.model.parameters()),
            "bare_step_ms": round(1e3 * statistics.median(turns.bare), 1),
            "engine_step_ms": round(1e3 * statistics.median(turns.engine), 1),
            "overhead_ms_median": round(1e3 * statistics.median(engine - bare for engine, bare in pairs), 2),
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_quartiles": [round(ratio, 4) for ratio in statistics.quantiles(ratios, n=4)[::2]],
            # CPU time, which other load on the machine disturbs less.
            "cpu_ratio_median": round(statistics.median(turns.cpu), 4),
            "steps": result.steps,
        }
        print(json.dumps(report, indent=1))


main()
