"""A program for the null GPU: the engine's own step, and what it launches, keeps and compiles, as one line of JSON.

python -m tests.nullgpu.steps '{"layers": 2, "rows": 4, "length": 1024}'
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch._dynamo.utils import counters

from gpt_simple.config.schema import Config
from gpt_simple.engine import compile as compiling
from gpt_simple.engine import precision
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.preflight.dry_run import DryRun
from gpt_simple.preflight.memory import predict_memory
from tests.nullgpu.events import allocations, count, read_log, waits

GPU = ctypes.CDLL("libcuda.so.1")
VOCABULARY = 50_257


def config(
    *,
    layers: int = 2,
    rows: int = 4,
    length: int = 1024,
    micro_batches: int = 2,
    compile: bool = True,
    scope: str = "model",
    checkpointing: bool = True,
    documents: bool = False,
    precision: str | None = None,
    **model: Any,
) -> Config:
    """The default configuration, 768 wide."""
    base = Config()
    return evolve(
        base,
        model=evolve(base.model, **{"n_embd": 768, "n_head": 12, "n_layer": layers} | model),
        data=evolve(base.data, max_length=length, document_mask=documents),
        training=evolve(
            base.training,
            per_device_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            compile=compile,
            compile_scope=scope,
            gradient_checkpointing=checkpointing,
            mixed_precision=precision,
        ),
    )


def prepared(cfg: Config) -> DryRun:
    """The step of this configuration on the GPU, marked at the beginning of each phase."""
    device = torch.device("cuda", 0)
    plan = compiling.plan(cfg.training, device, 1, explicit=True)
    setting = precision.resolve(cfg.training.mixed_precision, device)
    torch.set_float32_matmul_precision("high")
    run = DryRun.prepare(cfg, builtin_registry(), setting, vocab_size=VOCABULARY, compile_plan=plan)
    step = run.train_step
    backward, unscale = step.backward, setting.scaler.unscale_

    def marked_backward(loss: torch.Tensor) -> None:
        mark("backward")
        backward(loss)

    def marked_unscale(optimizer: torch.optim.Optimizer) -> None:
        mark("clip")
        unscale(optimizer)

    step.backward = marked_backward
    setting.scaler.unscale_ = marked_unscale  # type: ignore[method-assign]
    step.optimizer.register_step_pre_hook(lambda *_: mark("optimizer"))
    step.optimizer.register_step_post_hook(lambda *_: mark("end"))
    return run


def mark(what: str) -> None:
    GPU.nullgpu_mark(what.encode())


def on_batch(index: int, batch: Batch) -> None:
    mark("forward")


def recorded(work: Callable[[], object]) -> dict[str, list[str]]:
    """The events of ``work`` by phase: forward and backward of the first and the second micro-batch, and so on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        GPU.nullgpu_log(str(path).encode())
        mark("start")
        work()
        GPU.nullgpu_log(b"")
        events = read_log(path)
    phases: dict[str, list[str]] = {}
    seen: Counter[str] = Counter()
    for event in events:
        if event.startswith("mark "):
            name = event.removeprefix("mark ")
            seen[name] += 1
            now = phases.setdefault(f"{name} {seen[name]}" if name in ("forward", "backward") else name, [])
        else:
            now.append(event)
    return phases


def measure(cfg: Config) -> dict[str, Any]:
    """Two steps to warm up, then one recorded step, an evaluation and a step after it."""
    run = prepared(cfg)
    step = lambda: run.step(on_batch=on_batch)  # noqa: E731
    step()
    frames = [counters["frames"]["ok"]]
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    phases = recorded(step)
    torch.cuda.synchronize()
    everything = [event for events in phases.values() for event in events]
    peak = torch.cuda.max_memory_allocated()
    # An optimizer step needs workspaces of cuBLAS, which torch's allocator counts and the prediction leaves out.
    held = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    workspaces = held - torch.cuda.memory_allocated()
    run.evaluate()
    frames.append(counters["frames"]["ok"] - sum(frames))
    evaluation = recorded(run.evaluate)
    step()
    frames.append(counters["frames"]["ok"] - sum(frames))
    compiled = cfg.training.compile
    name = run.train_step.precision.name
    predicted = predict_memory(cfg, vocab_size=VOCABULARY, precision=name, compiled=compiled, cuda=True, workspaces=0)
    return {
        "phases": {name: count(events) for name, events in phases.items()},
        "waits": waits(everything),
        "allocations": allocations(everything),
        "evaluation": count(event for events in evaluation.values() for event in events),
        "frames": dict(zip(("training", "evaluation", "later"), frames, strict=True)),
        "graph breaks": dict(counters["graph_break"]),
        "peak": peak,
        "workspaces": workspaces,
        "predicted": predicted.training_peak,
    }


if __name__ == "__main__":
    print(json.dumps(measure(config(**json.loads(sys.argv[1])))))
