"""A program for two null GPUs: when a step begins to reduce its gradients, as one line of JSON.

python -m tests.nullgpu.reduction '{"layers": 4, "rows": 4, "length": 512}'
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from torch._dynamo.utils import counters

from gpt_simple.distributed.process_group import ProcessGroup, disband
from gpt_simple.engine import compile as compiling
from tests.nullgpu.events import LAUNCHES, kind
from tests.nullgpu.steps import config, prepared, recorded


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """The backward of a steady step's last micro-batch on rank 0.

    ``left``: the share of its matrix products, by their operations, that come after the first all_reduce starts.
    ``launches left``: the same share of its kernels.
    """
    cfg = config(**argument)
    dist = ProcessGroup.join(60.0)
    with compiling.compile_flags(compiling.plan(cfg.training, dist.device, dist.size, explicit=True)):
        run = prepared(cfg, dist)
        for _ in range(2):  # DDP arranges its buckets anew after the first backward
            run.step()
        phases = recorded(run.step)
    events = phases[f"backward {cfg.training.gradient_accumulation_steps}"]
    reductions = [place for place, event in enumerate(events) if event.startswith("nccl all_reduce")]
    after = events[reductions[0] :]
    return {
        "left": sum(map(operations, after)) / sum(map(operations, events)),
        "launches left": sum(map(is_launch, after)) / sum(map(is_launch, events)),
        "reductions": len(reductions),
        "graphs": counters["stats"]["unique_graphs"],
        "graph breaks": dict(counters["graph_break"]),
    }


def operations(event: str) -> int:
    """Multiplications of a matrix product, in units of which all have the same number of batches."""
    words = event.split()
    if words[0] != "gemm":
        return 0
    m, n, k = map(int, words[2:5])
    return m * n * k


def is_launch(event: str) -> bool:
    return kind(event) in LAUNCHES


if __name__ == "__main__":
    if "RANK" not in os.environ:
        os.environ["NULLGPU_COUNT"] = "2"
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        os.execv(sys.executable, [sys.executable, *start, "-m", "tests.nullgpu.reduction", *sys.argv[1:]])
    answer = json.dumps(measure(json.loads(sys.argv[1])))
    disband()
    if os.environ["RANK"] == "0":
        print(answer)
