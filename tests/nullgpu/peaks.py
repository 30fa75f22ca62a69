"""A program for the null GPU: the peak of torch's allocator in a steady step, and the prediction, as one line of JSON.

python -m tests.nullgpu.peaks '{"layers": 2, "checkpointing": false}'

Generated kernels allocate nothing, so none is compiled: a configuration takes seconds.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch._inductor import async_compile

from gpt_simple.config.schema import Config
from gpt_simple.preflight.memory import predict_memory
from tests.nullgpu.steps import VOCABULARY, config, prepared


class NoKernel:
    def run(self, *arguments: object, **named: object) -> None:
        """Launch nothing."""


def compile_no_kernels() -> None:
    async_compile.AsyncCompile.triton = lambda *_, **__: NoKernel()  # type: ignore[assignment]
    async_compile.CompiledTritonKernels.get = staticmethod(lambda *_, **__: None)  # type: ignore[assignment]


def measure(cfg: Config) -> dict[str, Any]:
    """Bytes without cuBLAS's workspaces."""
    run = prepared(cfg)
    run.step()
    run.step()
    torch.cuda.reset_peak_memory_stats()
    run.step()
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    workspaces = held - torch.cuda.memory_allocated()
    training, name = cfg.training, run.train_step.precision.name
    predicted = predict_memory(
        cfg, vocab_size=VOCABULARY, precision=name, compiled=training.compile, cuda=True, workspaces=0
    )
    return {"peak": peak - workspaces, "predicted": predicted.training_peak}


if __name__ == "__main__":
    compile_no_kernels()
    print(json.dumps(measure(config(**json.loads(sys.argv[1])))))
