"""bf16 against fp32 on this machine's CPU: optimizer steps of a 12M model (Llama's shape, 6 layers, 384 wide).

Two copies of one model alternate in one process, a block of steps each, because a machine's speed drifts by more than
the difference. The result is the median of the ratios of neighbouring blocks. A step is what the engine does with a
micro-batch: autocast as configured, summed loss, clipping, fused AdamW on fp32 weights.

bf16 pays off if the CPU has matrix tiles for it (AMX). With AVX512-BF16 alone it is about even or slower. Without
either it is emulated.

    python benchmarks/precision.py [--compile] [--blocks 8] [--block-steps 2] [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time

import torch

from gpt_simple import ModelConfig
from gpt_simple.engine.precision import resolve
from gpt_simple.model.gpt import build

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--blocks", type=int, default=8)
parser.add_argument("--block-steps", type=int, default=2)
parser.add_argument("--rows", type=int, default=8)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--vocab-size", type=int, default=4096)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--compile", action="store_true", help="as the engine does on a CPU with a compiler")
arguments = parser.parse_args()

CPU = torch.device("cpu")


class Candidate:
    """A model with its optimizer, stepped in one precision."""

    def __init__(self, model: torch.nn.Module, setting: str) -> None:
        self.precision = resolve(setting, CPU)
        self.model = copy.deepcopy(model)
        if arguments.compile:
            self.model.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.seconds: list[float] = []
        self.loss = 0.0

    def block(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """``--block-steps`` steps on the same rows; keeps seconds per step and the last loss."""
        started = time.perf_counter()
        for _ in range(arguments.block_steps):
            with self.precision.autocast():
                loss = self.model(inputs, labels) / labels.numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append((time.perf_counter() - started) / arguments.block_steps)
        self.loss = loss.item()


def main() -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = ModelConfig(n_embd=384, n_layer=6, n_head=6)
    model = build(config, vocab_size=arguments.vocab_size, max_length=arguments.length)
    tokens = torch.randint(arguments.vocab_size, (arguments.rows, arguments.length + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    fp32, bf16 = Candidate(model, "no"), Candidate(model, "bf16")
    for _ in range(arguments.blocks + 1):
        fp32.block(inputs, labels)
        bf16.block(inputs, labels)
    pairs = list(zip(fp32.seconds[1:], bf16.seconds[1:], strict=True))  # the first block warms up
    ratios = [slow / fast for slow, fast in pairs]
    report = {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "threads": arguments.threads,
        "compiled": arguments.compile,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fp32_ms": round(1e3 * statistics.median(slow for slow, _ in pairs), 1),
        "bf16_ms": round(1e3 * statistics.median(fast for _, fast in pairs), 1),
        "speedup_median": round(statistics.median(ratios), 3),
        "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "loss": {"fp32": round(fp32.loss, 4), "bf16": round(bf16.loss, 4)},
    }
    print(json.dumps(report, indent=1))


main()
