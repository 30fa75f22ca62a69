"""A first day on a GPU, prepared: one command that measures what no other machine can show.

    python benchmarks/gpu.py --out RESULTS                    # one device, the ten minutes that tell the most
    python benchmarks/gpu.py --out RESULTS --from resume      # goes on with what was left out
    python benchmarks/gpu.py --out RESULTS --devices 8        # ten more minutes, with eight

It runs from the source tree with the Python that is there, needs no installation and no network, and makes its data. A
package that is missing can be given as a wheel: the first thing it says is which ones are. Each part is a process with
a time limit, so one that fails or hangs does not stop the others. A part that does not fit into ``--budget`` is left
out. After each part, the results are in RESULTS/results.md and RESULTS/results.json; a later call adds to them. The
parts share one cache of compiled kernels, with the logs and the runs in RESULTS/work, or in another folder (--work).

``--tiny`` rehearses the day with sizes of a second each, on a GPU that computes nothing (tests/nullgpu): numbers are
written down and not judged. With ``--device cpu`` several processes rehearse on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import tomllib
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
GIB, MIB = 2**30, 2**20

BUDGET = 570.0
"""Seconds for all parts: a machine that is rented for minutes may end a command after ten."""
LEAST, MARGIN = 30.0, 5.0
"""Seconds with which a part can begin, and which it leaves at its end."""

Values = dict[str, Any]
Case = TypeVar("Case")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: the shape of a model with 124 million parameters, or a tiny one."""

    model: Values
    length: int
    vocab_size: int
    rows: tuple[int, int, int, int]
    """Rows of a micro-batch: with checkpointing, then without it."""
    seconds: float
    """How long a line of the throughput table is measured."""
    heads: tuple[tuple[int, int, int], ...]
    """Heads, heads of keys, and size of one, for the attention with documents."""
    attention: tuple[int, int]
    """Rows and tokens of a row for it."""
    judged: bool


REAL = Sizes(
    {"n_embd": 768, "n_layer": 12, "n_head": 12},
    length=1024,
    vocab_size=50_304,
    rows=(4, 16, 32, 64),
    seconds=4.0,
    heads=((12, 12, 64), (12, 4, 64), (6, 6, 128)),
    attention=(8, 2048),
    judged=True,
)
TINY = Sizes(
    {"n_embd": 128, "n_layer": 2, "n_head": 2},
    length=128,
    vocab_size=512,
    rows=(2, 2, 2, 2),  # one shape, which is compiled once
    seconds=0.1,
    heads=((2, 2, 64),),
    attention=(2, 256),
    judged=False,
)

SMALL = {
    "model.n_embd": 128,
    "model.n_layer": 2,
    "model.n_head": 2,
    "data.source": "stories",
    "data.tokenizer": "bytes",
    "data.max_length": 128,
    "data.max_documents": 2000,
    "optimizer.warmup_steps": 5,
    "training.per_device_batch_size": 8,
    "training.gradient_accumulation_steps": 2,
    "training.logging_steps": 1,
    "training.eval_steps": 0,
    "training.save_steps": 0,
    "plugins.disable": ["console", "sample"],
}
"""A run of seconds, for questions that do not depend on size."""


@dataclasses.dataclass
class Part:
    """What a part writes down: lines of its table, and what it found right or wrong. Written after each of them."""

    name: str
    work: Path
    sizes: Sizes
    deadline: float = math.inf
    """When it has to be done, by time.monotonic()."""
    devices: int = 1
    cpu: bool = False
    lines: list[Values] = dataclasses.field(default_factory=list)
    checks: list[Values] = dataclasses.field(default_factory=list)

    def line(self, **values: Any) -> None:
        self.lines.append(values)
        print(values, flush=True)
        self._write()

    def check(self, what: str, right: bool, detail: object = "", *, number: bool = False) -> None:
        """``number``: it depends on what a device computes, and is not judged in a rehearsal without one."""
        judged = self.sizes.judged or self.cpu or not number
        self.checks.append({"what": what, "right": bool(right) if judged else None, "detail": str(detail)[:500]})
        print(self.checks[-1], flush=True)
        self._write()

    def in_time(self, cases: Iterable[Case]) -> Iterator[Case]:
        """The cases for which there is time, going by those before them; the others are counted."""
        began, done, left_out = time.monotonic(), 0, 0
        for case in cases:
            now = time.monotonic()
            if done and now + (now - began) / done > self.deadline:
                left_out += 1
                continue
            yield case
            done += 1
        if left_out:
            self.line(left_out=f"{left_out} more, for lack of time")

    @contextmanager
    def guarded(self, **what: Any) -> Iterator[None]:
        """A failure inside is a line of the table, and the next line is measured."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.line(**what, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
            self.check(f"{what} runs", False, error)

    def folder(self, name: str) -> Path:
        """An output directory that holds no earlier run."""
        path = self.work / "runs" / f"{self.name}-{name}"
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self) -> None:
        write(self.work / f"{self.name}.json", json.dumps({"lines": self.lines, "checks": self.checks}))


# ---------------------------------------------------------------------------------------------------------- the parts


def machine(part: Part) -> None:
    """What this is, and what the torch on it cannot do."""
    import torch

    driver = shell("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader")
    part.line(what="nvidia-smi", value=driver)
    part.line(what="python", value=f"{platform.python_version()} on {os.cpu_count()} cores")
    part.line(what="build of torch", value=f"{torch.__version__}, CUDA {torch.version.cuda}")
    part.check("torch sees a GPU", torch.cuda.is_available())
    if not torch.cuda.is_available():
        return
    properties = torch.cuda.get_device_properties(0)
    part.line(what="device", value=f"{properties.name}, {properties.total_memory / GIB:.1f} GiB")
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    part.line(what="architectures", value=f"{capability} of {' '.join(torch.cuda.get_arch_list())}")
    if part.sizes.judged:  # cuDNN asks for more than a GPU that does nothing can answer
        part.line(what="cuDNN", value=torch.backends.cudnn.version())
    for each in dependencies():
        part.line(what=each["name"], value=each["found"] + (f", asked for {each['asked']}" if each["old"] else ""))
    part.line(what="triton", value=version_of("triton"))
    for name, place in (
        ("dist.all_gather_single (metrics of several processes)", "torch.distributed.all_gather_single"),
        ("fp32_precision (TF32 by the new interface)", "torch.backends.cuda.matmul.fp32_precision"),
        ("activation_memory_budget", "torch._functorch.config.activation_memory_budget"),
        ("flex attention", "torch.nn.attention.flex_attention.flex_attention"),
    ):
        part.line(what=name, value="yes" if exists(place) else "missing in this torch")
    from gpt_simple.config.schema import TrainingConfig
    from gpt_simple.engine.compile import plan

    reason = plan(TrainingConfig(), torch.device("cuda", 0), 1, explicit=False).warning
    part.check("torch.compile has what it needs", not reason, reason)


def correct(part: Part) -> None:
    """A GPU learns what a CPU learns: losses of the same run. fp32 on a GPU multiplies in TF32."""
    steps = 30 if part.sizes.judged else 4
    base = {**SMALL, "training.max_steps": steps}
    plans = {"plain": {}, "document mask": {"data.document_mask": True}}
    for name, plan in part.in_time(plans.items()):
        out = part.folder(f"cpu-{name}")
        values = {**base, **plan, "training.compile": False, "training.output_dir": str(out)}
        done = program(values, env={"CUDA_VISIBLE_DEVICES": ""})
        part.check(f"{name}: a CPU trains", done.returncode == 0, done.stderr[-400:])
        expected = losses(out)
        for precision, compiled, tolerance in (
            ("no", False, 5e-3),
            ("no", True, 5e-3),
            ("bf16", False, 3e-2),
            ("bf16", True, 3e-2),
            ("fp16", True, 3e-2),
        ):
            what = {"run": name, "precision": precision, "compile": compiled}
            with part.guarded(**what):
                place = part.folder(f"{name}-{precision}-{compiled}")
                train({**base, **plan, "training.mixed_precision": precision, "training.compile": compiled}, place)
                found = losses(place)
                gaps = [abs(a - b) for a, b in zip(found, expected, strict=True)]
                gap = math.nan if any(map(math.isnan, gaps)) else max(gaps)
                part.line(**what, first_loss=f"{found[0]:.4f}", last_loss=f"{found[-1]:.4f}", largest_gap=f"{gap:.5f}")
                part.check(f"{what}: within {tolerance} of the CPU", gap <= tolerance, gap, number=True)


def syncs(part: Part) -> None:
    """torch raises where the host waits for the device between two logging points."""
    import torch

    from gpt_simple.hooks import NoConfig, Plugin, hookimpl

    class NoWaits(Plugin[NoConfig]):
        on_error = "abort"

        @hookimpl
        def on_step_start(self, run: Any, event: Any) -> None:
            if event.step % 5 == 2:
                torch.cuda.set_sync_debug_mode("error")

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            if event.step % 5 == 0:
                torch.cuda.set_sync_debug_mode("default")

    cases: dict[str, Values] = {
        "compiled": {},
        "eager": {"training.compile": False},
        "compiled, document mask": {"data.document_mask": True},
        "compiled, fp16": {"training.mixed_precision": "fp16"},
        "compiled, dropout": {"model.dropout": 0.1},
    }
    for name, changes in part.in_time(cases.items()):
        try:
            with part.guarded(run=name):
                values = {**SMALL, **changes, "training.max_steps": 20, "training.logging_steps": 5}
                train(values, part.folder(name), [NoWaits])
                part.line(run=name, waits="none")
                part.check(f"{name}: no step waits", True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def throughput(part: Part) -> None:
    """The engine's own step on random rows, without data and plugins; MFU counts full attention (PaLM)."""
    default, small, middle, large = part.sizes.rows
    off = {"training.gradient_checkpointing": False}
    table: list[tuple[str, int, Values]] = [
        ("default", default, {}),
        ("no checkpointing", middle, off),
        ("no checkpointing", small, off),
        ("no checkpointing", large, off),
        ("document mask", middle, {**off, "data.document_mask": True}),
        ("blocks", middle, {**off, "training.compile_scope": "blocks"}),
        ("eager", small, {**off, "training.compile": False}),
        ("fp16", middle, {**off, "training.mixed_precision": "fp16"}),
        ("GPT-2's shape", middle, {**off, **GPT2}),
        ("4 heads of keys", middle, {**off, "model.n_kv_head": 4 if part.sizes.judged else 1}),
        ("checkpointing", large, {}),
    ]
    best = 0.0
    for name, rows, changes in part.in_time(table):
        with part.guarded(variant=name, rows=rows), stepping(part.sizes, rows, changes) as step:
            measured = step.measure(part.sizes.seconds)
            best = max(best, measured["mfu"] or 0.0)
            part.line(variant=name, rows=rows, **measured)
    part.check("45 % MFU", best >= 0.45, f"{best:.1%}", number=True)


GPT2 = {
    "model.norm": "layernorm",
    "model.position": "learned",
    "model.mlp_type": "mlp",
    "model.activation": "gelu",
    "model.use_bias": True,
}


def memory(part: Part) -> None:
    """The peak of torch's allocator against the prediction. cuBLAS's workspaces are counted apart."""
    import torch

    from gpt_simple.preflight.memory import predict_memory

    default, small, *_ = part.sizes.rows
    off = {"training.gradient_checkpointing": False}
    eager = {"training.compile": False}
    table: list[tuple[str, int, Values]] = [
        ("compiled", small, off),  # these two are compiled by now
        ("compiled, checkpointing", default, {}),
        ("eager", small, {**off, **eager}),
        ("eager, checkpointing", small, eager),
        ("eager, document mask", default, {**off, **eager, "data.document_mask": True}),
    ]
    for name, rows, changes in part.in_time(table):
        with part.guarded(variant=name, rows=rows), stepping(part.sizes, rows, changes) as step:
            for _ in range(3):
                step.run()
            peak = torch.cuda.max_memory_allocated()
            held = torch.cuda.memory_allocated()
            torch._C._cuda_clearCublasWorkspaces()
            workspaces = held - torch.cuda.memory_allocated()
            free, total = torch.cuda.mem_get_info()
            predicted = predict_memory(
                step.config,
                vocab_size=part.sizes.vocab_size,
                precision=step.precision,
                compiled=step.config.training.compile,
                cuda=True,
                workspaces=0,  # they are counted apart
            ).training_peak
            error = predicted / (peak - workspaces) - 1
            part.line(
                variant=name,
                rows=rows,
                predicted_mib=round(predicted / MIB, 1),
                measured_mib=round((peak - workspaces) / MIB, 1),
                error=f"{error:+.1%}",
                workspaces_mib=round(workspaces / MIB, 1),
                whole_device_mib=round((total - free) / MIB),
            )
            within = -0.005 <= error <= 0.15 if step.config.training.compile else abs(error) <= 0.02
            part.check(f"{name}: predicted within 2 % (compiled: at most 15 % above)", within, error, number=True)


def flex(part: Part) -> None:
    """Attention inside documents: the generated kernel against a dense mask, values, gradients and time."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from gpt_simple.model import documents

    device = torch.device("cuda", 0)
    rows, length = part.sizes.attention
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(rows, length, generator=generator) < 8 / length).cumsum(1).to(device)
    for heads, key_heads, size in part.in_time(part.sizes.heads):
        what = {"heads": heads, "key_heads": key_heads, "size": size}
        with part.guarded(**what):
            shapes = [(rows, count, length, size) for count in (heads, key_heads, key_heads)]
            q, k, v = (
                torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for shape in shapes
            )
            upstream = torch.randn(shapes[0], generator=generator).to(device, torch.bfloat16)
            mask, dense = documents.block_mask(ids), documents.dense_mask(ids)

            def generated(q=q, k=k, v=v, mask=mask) -> Any:
                return documents.flex(q, k, v, mask)

            def masked(q=q, k=k, v=v, dense=dense) -> Any:
                return scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=q.shape[1] != k.shape[1])

            answers, milliseconds = [], []
            for call in (generated, masked):

                def both(call=call, q=q, k=k, v=v, upstream=upstream) -> Any:
                    result = call()
                    return [result.detach(), *torch.autograd.grad(result, (q, k, v), upstream)]

                answers.append(both())
                milliseconds.append(timed(both, part.sizes.seconds / 4) * 1e3)
            gaps = [
                float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9))
                for a, b in zip(*answers, strict=True)
            ]
            part.line(
                **what,
                kernel=documents.document_kernel(device, torch.bfloat16, size, 0.0),
                flex_ms=round(milliseconds[0], 3),
                dense_ms=round(milliseconds[1], 3),
                largest_gap=round(max(gaps), 5),
            )
            right = all(gap <= 0.02 for gap in gaps)  # false for NaN
            part.check(f"{what}: values and gradients within 2 %", right, gaps, number=True)


def resume(part: Part) -> None:
    """The same run twice, and once in two halves: the bits of the weights."""
    cases: dict[str, Values] = {
        "default": {},
        "deterministic": {"training.deterministic": True},
        "deterministic, dropout": {"training.deterministic": True, "model.dropout": 0.1},
        "dropout": {"model.dropout": 0.1},
        "eager": {"training.compile": False},
    }
    for name, changes in part.in_time(cases.items()):
        with part.guarded(run=name):
            values = {**SMALL, **changes, "training.max_steps": 20}
            once, again, halves = (part.folder(f"{name}-{way}") for way in ("once", "again", "halves"))
            whole, second = weights_after(values, once), weights_after(values, again)
            weights_after({**values, "training.max_steps": 10}, halves)
            resumed = weights_after(values, halves)
            gap = abs(losses(halves)[-1] - losses(once)[-1])
            equal = {"again": whole == second, "in halves": whole == resumed}
            part.line(run=name, **equal, last_loss_gap=f"{gap:.5f}")
            part.check(f"{name}: the loss goes on", gap <= 0.02, gap, number=True)
            if "deterministic" in name:
                part.check(f"{name}: equal bits", all(equal.values()), equal, number=True)


def saving(part: Part) -> None:
    """How long a save holds the training up, of the whole program with its data."""
    from gpt_simple.hooks import NoConfig, Plugin, hookimpl

    class Clock(Plugin[NoConfig]):
        ends: dict[int, float]
        starts: dict[int, float]

        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            Clock.ends, Clock.starts = {}, {}

        @hookimpl
        def on_step_start(self, run: Any, event: Any) -> None:
            Clock.starts[event.step] = time.perf_counter()

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            Clock.ends[event.step] = time.perf_counter()

    model = {f"model.{name}": value for name, value in part.sizes.model.items()}
    rows = part.sizes.rows[1]
    values = {
        **SMALL,
        **model,
        "model.vocab_size": part.sizes.vocab_size,
        "data.max_length": part.sizes.length,
        "data.max_documents": 60_000 if part.sizes.judged else 2000,
        "training.gradient_checkpointing": False,
        "training.per_device_batch_size": rows,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 30,
        "training.logging_steps": 5,
        "training.save_steps": 10,
    }
    for name, background in (("foreground", False), ("background", True)):
        with part.guarded(save=name):
            place = part.folder(name)
            train({**values, "training.background_save": background}, place, [Clock])
            gaps = {step: Clock.starts[step + 1] - end for step, end in Clock.ends.items() if step + 1 in Clock.starts}
            pauses = [gap for step, gap in gaps.items() if step % 10 == 0]
            others = [gap for step, gap in gaps.items() if step % 5]
            size = sum(file.stat().st_size for file in next((place / "checkpoints").glob("step-*")).rglob("*"))
            rates = [row["perf/tokens_per_second"] for row in logged(place) if "perf/tokens_per_second" in row]
            part.line(
                save=name,
                pause_ms=round(1e3 * statistics.median(pauses), 1),
                other_gap_ms=round(1e3 * statistics.median(others), 2),
                checkpoint_mib=round(size / MIB, 1),
                tokens_per_second=round(rates[-1]) if rates else None,
            )


def stopping(part: Part) -> None:
    """SIGTERM in the middle: a checkpoint, exit code 75, and the next launch goes on."""
    place = part.folder("sigterm")
    values = {**SMALL, "training.max_steps": 100_000, "training.output_dir": str(place)}
    process = subprocess.Popen(command(values), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not losses(place) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    seconds = time.monotonic() - asked
    part.line(exit=process.returncode, seconds=round(seconds, 2), steps=len(losses(place)))
    part.check("exit code 75", process.returncode == 75, f"{process.returncode} {err[-300:]}")
    done = len(losses(place))
    again = program({**values, "training.max_steps": done + 5})
    part.check("the next launch goes on", again.returncode == 0 and len(losses(place)) > done, again.stderr[-300:])


def out_of_memory(part: Part) -> None:
    """A batch that cannot fit: one error and exit code 1, and the same directory trains with a smaller one."""
    place = part.folder("oom")
    big = {
        **SMALL,
        **{f"model.{name}": value for name, value in REAL.model.items()},
        "model.vocab_size": 50_304,
        "data.max_length": 1024,
        "training.compile": False,
        "training.gradient_checkpointing": False,
        "training.per_device_batch_size": 1024,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 2,
        "training.output_dir": str(place),
    }
    done = program(big)
    lines = done.stderr.strip().splitlines()
    part.line(exit=done.returncode, lines=len(lines), last=lines[-1][:200] if lines else "")
    part.check("exit code 1", done.returncode == 1, done.stderr[-300:])
    part.check("it says out of memory", bool(re.search("out ?of ?memory", done.stderr, re.IGNORECASE)))
    part.check("no traceback", "Traceback" not in done.stderr)
    small = program({**big, "training.per_device_batch_size": 2})
    part.check("the directory can be used again", small.returncode == 0, small.stderr[-300:])


def profile(part: Part) -> None:
    """Where the time of a step goes: the kernels with the most of it."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    off = {"training.gradient_checkpointing": False}
    with stepping(part.sizes, part.sizes.rows[2], off) as step:
        for _ in range(3):
            step.run()
        torch.cuda.synchronize()
        with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            began = time.perf_counter()
            for _ in range(3):
                step.run()
            torch.cuda.synchronize()
            wall = time.perf_counter() - began
    kernels = [each for each in seen.key_averages() if each.self_device_time_total > 0]
    busy = sum(each.self_device_time_total for each in kernels) / 1e6
    for each in sorted(kernels, key=lambda each: -each.self_device_time_total)[:20]:
        share = each.self_device_time_total / 1e6 / busy
        part.line(kernel=each.key[:100], calls=each.count // 3, share=f"{share:.1%}")
    part.line(kernel="all", calls=sum(each.count for each in kernels) // 3, share=f"{busy / wall:.1%} of the time")
    part.check("the device is busy", busy / wall > 0.95, f"{busy / wall:.1%}", number=True)


PARTS: dict[str, tuple[Callable[[Part], None], int]] = {
    "machine": (machine, 60),
    "correct": (correct, 180),
    "syncs": (syncs, 120),
    "throughput": (throughput, 240),
    "memory": (memory, 120),
    "profile": (profile, 90),
    "flex": (flex, 90),
    "resume": (resume, 180),
    "saving": (saving, 120),
    "oom": (out_of_memory, 90),
    "sigterm": (stopping, 90),
}
"""In the order in which they tell the most, with the seconds that each may take."""


# ----------------------------------------------------------------------------------------- the parts on several devices


def group(part: Part) -> None:
    """Which devices these are, and how they reach each other."""
    import torch

    part.line(what="torch", value=f"{torch.__version__}, CUDA {torch.version.cuda}")
    if part.cpu:
        part.line(what="device", value=f"{os.cpu_count()} cores")
        return
    count = torch.cuda.device_count()
    for name, number in Counter(map(torch.cuda.get_device_name, range(count))).items():
        part.line(what="devices", value=f"{number} x {name}")
    part.line(what="NCCL", value=".".join(map(str, torch.cuda.nccl.version())))
    part.check(f"torch sees {part.devices} devices", count >= part.devices, count)
    direct = sum(torch.cuda.can_device_access_peer(0, other) for other in range(1, count))
    part.line(what="peers that device 0 reads directly", value=f"{direct} of {count - 1}")
    for line in shell("nvidia-smi", "topo", "-m").splitlines():
        part.line(what="topology", value=" ".join(line.split()))


def alike(part: Part) -> None:
    """One process and several learn the same: losses of the same rows, in fp32, to 1e-4."""
    cases = {"eager": False} if part.cpu else {"eager": False, "compiled": True}
    for name, compiled in part.in_time(cases.items()):
        found = {}
        for processes in (1, part.devices):
            place = part.folder(f"{name}-{processes}")
            values = {
                **SMALL,
                "training.compile": compiled,
                "training.mixed_precision": "no",
                "training.per_device_batch_size": 2,
                "training.gradient_accumulation_steps": part.devices // processes,
                "training.max_steps": 20 if part.sizes.judged else 4,
                "training.output_dir": str(place),
            }
            done = program(values, processes=processes)
            part.check(f"{name}: {processes} processes train", done.returncode == 0, done.stderr[-400:])
            part.check(
                f"{name}, {processes} processes: NCCL does not warn", "NCCL WARN" not in done.stdout + done.stderr
            )
            found[processes] = losses(place)
        gaps = [abs(a - b) for a, b in zip(found[1], found[part.devices], strict=True)]
        gap = math.nan if not gaps or any(map(math.isnan, gaps)) else max(gaps)
        part.line(run=name, last_loss=f"{found[1][-1]:.5f}" if found[1] else "", largest_gap=f"{gap:.2e}")
        part.check(f"{name}: losses of 1 and {part.devices} processes within 1e-4", gap <= 1e-4, gap, number=True)


def scaling(part: Part) -> None:
    """The whole program on 1, 2, 4, ... processes. Efficiency: tokens a second, over so many times those of one."""
    ways: list[tuple[str, bool, Values]] = [
        ("split", False, {"training.ddp_optimizer": "split"}),
        ("off", False, {"training.ddp_optimizer": "off"}),
        ("off", True, {"training.ddp_optimizer": "off"}),
        ("split", True, {"training.ddp_optimizer": "split"}),
        ("blocks", False, {"training.compile_scope": "blocks"}),
        ("blocks", True, {"training.compile_scope": "blocks"}),
    ]
    if part.cpu:
        ways = [("eager", checkpointing, {"training.compile": False}) for checkpointing in (False, True)]
    counts = [2**power for power in range(1, part.devices.bit_length()) if 2**power < part.devices]
    table = [(count, *way) for way in ways for count in (1, part.devices)]
    table += [(count, *way) for count in reversed(counts) for way in ways]
    model = {f"model.{name}": value for name, value in part.sizes.model.items()}
    of_one: dict[tuple[bool, bool], float] = {}
    best = 0.0
    for count, name, checkpointing, changes in part.in_time(table):
        kind = (name == "blocks", checkpointing)  # one process has no buckets of gradients: "split" and "off" are one
        if count == 1 and kind in of_one:
            continue
        with part.guarded(processes=count, graphs=name, checkpointing=checkpointing):
            place = part.folder(f"{count}-{name}-{checkpointing}")
            values = {
                **SMALL,
                **model,
                **changes,
                "model.vocab_size": part.sizes.vocab_size,
                "data.max_length": part.sizes.length,
                "data.max_documents": 20_000 if part.sizes.judged else 2000,
                "training.gradient_checkpointing": checkpointing,
                "training.per_device_batch_size": part.sizes.rows[1],
                "training.gradient_accumulation_steps": 1,
                "training.max_steps": 50 if part.sizes.judged else 4,
                "training.logging_steps": 10 if part.sizes.judged else 2,
                "training.output_dir": str(place),
            }
            done = program(values, processes=count)
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[-300:] or f"exit code {done.returncode}")
            # The first steps come while others still compile.
            rows = [row for row in logged(place) if "perf/tokens_per_second" in row][1:]
            rate = statistics.median(row["perf/tokens_per_second"] for row in rows)
            if count == 1:
                of_one[kind] = rate
            efficiency = rate / count / of_one[kind] if kind in of_one else math.nan
            if count == part.devices:
                best = max(best, efficiency)
            part.line(
                processes=count,
                graphs=name,
                checkpointing=checkpointing,
                tokens_per_second=round(rate),
                step_ms=round(statistics.median(row["perf/step_ms"] for row in rows), 1),
                mfu=rows[-1].get("perf/mfu"),
                efficiency=f"{efficiency:.1%}",
            )
    if part.sizes.judged:
        part.check(f"{part.devices} devices do 90 % of so many times one", best >= 0.9, f"{best:.1%}", number=True)


FATE = """
import os
from pathlib import Path

from gpt_simple.hooks import NoConfig, Plugin, hookimpl


class Fate(Plugin[NoConfig]):
    ranks = "all"

    @hookimpl
    def on_step_start(self, run, event):
        if event.step == 3 and run.rank == run.world_size - 1:
            (run.output_dir / "fate").write_text(str(os.getpid()))
            os.kill(os.getpid(), int(os.environ["FATE"]))
"""
"""A plugin with which the last process gets a signal in step 3."""


def fated(part: Part, what: signal.Signals, said: str, **changes: Any) -> None:
    """A run in which the last process gets this signal: it ends with an error that says so, and can be resumed."""
    place, plugin = part.folder(what.name), part.work / "fate.py"
    write(plugin, FATE)
    values = {
        **SMALL,
        **changes,
        "training.compile": False,
        "training.max_steps": 6,
        "training.save_steps": 2,
        "training.output_dir": str(place),
    }
    began = time.monotonic()
    done = program(values, "-p", str(plugin), env={"FATE": str(int(what))}, processes=part.devices)
    error = next((line for line in done.stderr.splitlines() if line.startswith("error")), done.stderr[-300:])
    part.line(signal=what.name, exit=done.returncode, seconds=round(time.monotonic() - began, 1), error=error)
    part.check("exit code 1", done.returncode == 1, done.stderr[-300:])
    expected = f"process {part.devices - 1} {said}"
    part.check(f"the error says: {expected}", expected in error, error)
    part.check("no traceback", "Traceback" not in done.stderr, done.stderr[-300:])
    marked = place / "fate"
    gone = marked.exists() and not Path("/proc", marked.read_text()).exists()
    part.check("the process is gone", gone)
    again = program(values, processes=part.devices)
    steps = [row["step"] for row in logged(place) if "train/loss" in row]
    part.check("the next launch resumes", again.returncode == 0, again.stderr[-300:])
    part.check("each step is logged once", steps == list(range(1, 7)), steps)


def hanging(part: Part) -> None:
    """A process that hangs (SIGSTOP) is named by the others when training.peer_timeout_seconds have passed."""
    seconds = 20 if part.sizes.judged else 5
    fated(part, signal.SIGSTOP, "did not come to the end of step", **{"training.peer_timeout_seconds": seconds})


def killed(part: Part) -> None:
    """A process that is killed (SIGKILL) ends the run at once, with its name."""
    fated(part, signal.SIGKILL, "was killed")


def alone(part: Part) -> None:
    """Processes that see one device each, as srun --gpus-per-task=1 starts them."""
    place = part.folder("alone")
    steps = 4
    values = {**SMALL, "training.compile": False, "training.max_steps": steps, "training.output_dir": str(place)}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": part.devices, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = []
    for rank in range(part.devices):
        own = {} if part.cpu else {"CUDA_VISIBLE_DEVICES": visible_device(rank)}
        place_of_one = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": part.devices}
        env = {name: str(value) for name, value in {**shared, **place_of_one, **own}.items()}
        processes.append(
            subprocess.Popen(
                command(values), env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    texts = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    part.line(exits=" ".join(map(str, codes)), steps=len(losses(place)))
    part.check("all processes end with 0", not any(codes), "\n".join(text[-300:] for text in texts))
    part.check("all steps are trained", len(losses(place)) == steps, len(losses(place)))
    part.check("NCCL does not warn", not any("NCCL WARN" in text for text in texts))


def visible_device(rank: int) -> str:
    """The device of a process, where the machine may already hide some."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[rank] if given else str(rank)


SEVERAL: dict[str, tuple[Callable[[Part], None], int]] = {
    "group": (group, 60),
    "alike": (alike, 150),
    "hanging": (hanging, 120),
    "killed": (killed, 90),
    "alone": (alone, 60),
    "scaling": (scaling, 600),
}
"""With ``--devices``. The last one takes the time that is left."""


# ---------------------------------------------------------------------------------------------------- what they share


def train(values: Values, place: Path, plugins: Sequence[Any] = ()) -> None:
    """A run in this process."""
    import gpt_simple

    gpt_simple.train(overrides={**values, "training.output_dir": str(place)}, plugins=plugins)


def command(values: Values, *options: str) -> list[str]:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [sys.executable, "-m", "gpt_simple", "run", *options, *(f"--{key}={text}" for key, text in texts.items())]


def program(
    values: Values, *options: str, env: Mapping[str, str] | None = None, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """A run of the whole program in a process of its own, or in several."""
    several = ["--nproc_per_node", str(processes)] if processes > 1 else []
    return subprocess.run(
        command(values, *several, *options),
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def logged(place: Path) -> list[Values]:
    path = place / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(place: Path) -> list[float]:
    """The training losses of a run; NaN for one that is not finite."""
    found = [row["train/loss"] for row in logged(place) if "train/loss" in row]
    return [float("nan") if loss is None else loss for loss in found]


def weights_after(values: Values, place: Path) -> str:
    """A digest of all bits of the weights at the end of a run."""
    from gpt_simple.hooks import NoConfig, Plugin, hookimpl

    class Digest(Plugin[NoConfig]):
        value = ""

        @hookimpl
        def on_run_end(self, run: Any, event: Any) -> None:
            import torch

            digest = hashlib.sha256()
            for name, tensor in run.model.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            Digest.value = digest.hexdigest()

    train(values, place, [Digest])
    return Digest.value


@dataclasses.dataclass
class Stepping:
    """The engine's own step on random rows."""

    dry_run: Any
    config: Any
    precision: str
    flops: float
    """Of a step."""
    peak_flops: float | None

    def run(self) -> None:
        self.dry_run.step()

    def measure(self, seconds: float) -> Values:
        import torch

        began = time.perf_counter()
        self.run()
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        self.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step = timed(self.run, seconds)
        batch = self.dry_run.batch
        tokens = batch.input_ids.numel() * self.dry_run.micro_batches
        mfu = self.flops / step / self.peak_flops if self.peak_flops else None
        return {
            "tokens_per_second": round(tokens / step),
            "step_ms": round(1e3 * step, 2),
            "mfu": None if mfu is None else round(mfu, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "first_step_s": round(first, 1),
        }


@contextmanager
def stepping(sizes: Sizes, rows: int, changes: Values) -> Iterator[Stepping]:
    import gc

    import torch

    from gpt_simple.config.schema import Config
    from gpt_simple.engine.compile import compile_flags, plan
    from gpt_simple.engine.precision import resolve
    from gpt_simple.engine.process_state import preserved_process_state
    from gpt_simple.hardware import peak_flops
    from gpt_simple.hooks.components import builtin_registry
    from gpt_simple.preflight.dry_run import DryRun

    sections: dict[str, Values] = {
        "model": dict(sizes.model),
        "data": {"max_length": sizes.length},
        "training": {"per_device_batch_size": rows, "gradient_accumulation_steps": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    base = Config()
    config = evolved(base, **{name: evolved(getattr(base, name), **values) for name, values in sections.items()})
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    with preserved_process_state():
        precision = resolve(config.training.mixed_precision, device)
        compiling = plan(config.training, device, 1, explicit=True)
        with compile_flags(compiling):
            dry_run = DryRun.prepare(
                config, builtin_registry(), precision, vocab_size=sizes.vocab_size, compile_plan=compiling
            )
            tokens = dry_run.batch.input_ids.numel() * dry_run.micro_batches
            flops = dry_run.train_step.model.flops_per_token(sizes.length) * tokens
            peak = peak_flops(torch.cuda.get_device_name(0), precision.name)
            step = Stepping(dry_run, config, precision.name, flops, peak)
            del dry_run
            try:
                yield step
            finally:
                step.dry_run = None  # the caller's variable lives on while the next variant is built
                gc.collect()


def evolved(value: Any, **changes: Any) -> Any:
    from attrs import evolve

    return evolve(value, **changes)


def timed(work: Callable[[], object], seconds: float) -> float:
    """Seconds of one call: the mean over as many as fit into ``seconds``, queued without a wait between them."""
    import torch

    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    count = max(3, min(200, int(seconds / max(1e-6, time.perf_counter() - began))))
    began = time.perf_counter()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def shell(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except OSError as error:
        return str(error)


def version_of(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return "missing"


def exists(place: str) -> bool:
    parts = place.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        try:
            for name in parts[cut:]:
                value = getattr(value, name)
        except (AttributeError, RuntimeError):
            return False
        return True
    return False


def dependencies() -> list[Values]:
    """What the project needs: the version that is here, or why it cannot be imported."""
    found = []
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, _, least = text.partition(">=")
        module = {"pyyaml": "yaml"}.get(name.lower(), name.replace("-", "_"))
        try:
            importlib.import_module(module)
        except ImportError as error:
            found.append({"name": name, "asked": text, "found": str(error), "missing": True, "old": False})
            continue
        version = version_of(name)
        old = numbers(version) < numbers(least)
        found.append({"name": name, "asked": text, "found": version, "missing": False, "old": old})
    return found


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def write(path: Path, text: str) -> None:
    made = path.with_suffix(".new")
    made.write_text(text)
    made.replace(path)


# ------------------------------------------------------------------------------------------------------------ the day


def environment(work: Path, wheels: Path | None, *, cpu: bool) -> dict[str, str]:
    """The source tree as if it were installed: its modules, and metadata by which its own plugins are found."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = (ROOT / "src/gpt_simple/_names.py").read_text()
    version = re.search(r'__version__ = "(.*)"', names)
    assert version is not None
    metadata = work / "metadata" / f"{project['name'].replace('-', '_')}-{version[1]}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version[1]}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    path = [ROOT / "src", metadata.parent]
    if wheels:
        path.append(work / "wheels")
        shutil.rmtree(path[-1], ignore_errors=True)
        for wheel in sorted(wheels.glob("*.whl")):  # unpacked: Python imports no compiled modules from archives
            zipfile.ZipFile(wheel).extractall(path[-1])
    has_own = any(name.endswith("_ALLOC_CONF") for name in os.environ)
    return {
        **({} if has_own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),  # as the commands set it
        "TORCHINDUCTOR_CACHE_DIR": str(work / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(work / "cache" / "triton"),
        "GPT_SIMPLE_CACHE": str(work / "cache" / "data"),
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_DEBUG": "WARN",
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {}),
        "PYTHONPATH": os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def require_dependencies(env: Mapping[str, str]) -> None:
    """Leave with the names of the packages that this Python lacks."""
    script = str(Path(__file__).resolve())
    done = subprocess.run([sys.executable, script, "--dependencies"], env=env, stdout=subprocess.PIPE, check=True)
    missing = [each for each in json.loads(done.stdout.splitlines()[-1]) if each["missing"]]
    if not missing:
        return
    version = platform.python_version()
    names = " ".join(f"'{each['asked']}'" for each in missing)
    print(f"Python {version} ({sys.executable}) lacks packages:", file=sys.stderr)
    for each in missing:
        print(f"  {each['asked']}: {each['found']}", file=sys.stderr)
    print(
        "Install them, or put wheels of them into a folder and name it with --wheels. Where there is a network:\n"
        f"  pip download --no-deps --only-binary=:all: --python-version {version.rpartition('.')[0]} -d FOLDER {names}",
        file=sys.stderr,
    )
    sys.exit(2)


LEFT_OUT = "left out, for lack of time"


def run_part(name: str, given: argparse.Namespace, env: Mapping[str, str], seconds: float) -> Values:
    """One part in a process of its own, with what it wrote down however it ended."""
    written, log = given.work / f"{name}.json", given.work / f"{name}.log"
    written.unlink(missing_ok=True)
    words = [sys.executable, str(Path(__file__).resolve()), "--out", str(given.out), "--work", str(given.work)]
    words += ["--part", name, "--seconds", str(seconds), "--devices", str(given.devices), "--device", given.device]
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            words + ["--tiny"] * given.tiny, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            ended = "ok" if code == 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"was stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(written.read_text()) if written.exists() else {"lines": [], "checks": []}
    part = {"ended": ended, "seconds": round(time.monotonic() - began, 1), **found}
    if wrong(part):
        part["log"] = log.read_text(errors="replace")[-3000:]
    return part


def wrong(part: Values) -> list[str]:
    """What did not go as expected in a part."""
    found = [check["what"] for check in part["checks"] if check["right"] is False]
    return found if part["ended"] in ("ok", LEFT_OUT) else [part["ended"], *found]


def markdown(results: Mapping[str, Values], *, tiny: bool) -> str:
    text = ["# A day on a GPU", ""]
    if tiny:
        text += ["A rehearsal with tiny sizes: these numbers say nothing about a GPU.", ""]
    for name, (work, _) in {**PARTS, **SEVERAL}.items():
        if (part := results.get(name)) is None:
            continue
        text += [f"## {name}", "", f"{work.__doc__} {part['seconds']} s.", ""]
        if part["ended"] == LEFT_OUT:
            text += [f"It was {LEFT_OUT}.", ""]
            continue
        columns = list(dict.fromkeys(key for line in part["lines"] for key in line))
        if columns:
            text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            text += [f"| {' | '.join(str(line.get(key, '')) for key in columns)} |" for line in part["lines"]]
            text.append("")
        text += [f"- **wrong**: {what}" for what in wrong(part)]
        right = sum(check["right"] is True for check in part["checks"])
        text += [f"- {right} checks right, {len(wrong(part))} wrong", ""]
        if "log" in part:
            text += ["```", *part["log"].strip().splitlines()[-15:], "```", ""]
    return "\n".join(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of caches, runs and logs, if not RESULTS/work")
    parser.add_argument("--from", dest="first", metavar="PART", help="begin at this part")
    parser.add_argument("--only", metavar="PARTS", help="these parts, separated by commas")
    parser.add_argument("--budget", type=float, help="seconds for all parts (570; a rehearsal has no limit)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="the parts for several devices, with N")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: for a rehearsal of --devices")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this Python lacks")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny sizes, and numbers are not judged")
    for name, kind in (("--part", str), ("--seconds", float)):  # of the process of a part
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--dependencies", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dependencies:
        return given
    if given.out is None:
        parser.error("--out is missing: the folder of the results")
    if given.device == "cpu" and (given.devices == 1 or not given.tiny):
        parser.error("--device cpu rehearses the parts for several devices: give --tiny and --devices N, too")
    if given.wheels and not any(given.wheels.glob("*.whl")):
        parser.error(f"--wheels {given.wheels} has no *.whl")
    names = list(PARTS if given.devices == 1 else SEVERAL)
    asked = given.only.split(",") if given.only else [given.first] if given.first else names
    if unknown := [name for name in asked if name not in names]:
        parser.error(f"unknown parts {', '.join(unknown)}: expected some of {', '.join(names)}")
    given.names = names[names.index(given.first) :] if given.first else asked
    given.out = given.out.resolve()
    given.work = (given.work or given.out / "work").resolve()
    for folder in (given.out, given.work):
        folder.mkdir(parents=True, exist_ok=True)
    return given


def main() -> int:
    given = arguments()
    ends = time.monotonic() + (given.budget or (math.inf if given.tiny else BUDGET))
    if given.dependencies:
        print(json.dumps(dependencies()))
        return 0
    if given.part:
        import torch

        cpu = given.device == "cpu"
        if given.part != "machine" and not cpu and not torch.cuda.is_available():
            sys.exit("torch sees no GPU, and a CPU has nothing to say here")
        sizes, deadline = TINY if given.tiny else REAL, time.monotonic() + given.seconds - MARGIN
        work, _ = {**PARTS, **SEVERAL}[given.part]
        work(Part(given.part, given.work, sizes, deadline, given.devices, cpu))
        return 0
    path = given.out / "results.json"
    results: dict[str, Values] = json.loads(path.read_text()) if path.exists() else {}
    env = environment(given.work, given.wheels, cpu=given.device == "cpu")
    require_dependencies(env)
    left_out = []
    for name in given.names:
        left = ends - time.monotonic()
        if left < LEAST:
            results.setdefault(name, {"ended": LEFT_OUT, "seconds": 0, "lines": [], "checks": []})
            left_out.append(name)
        else:
            print(f"{name} ...", end=" ", flush=True)
            # A rehearsal shares a machine without a GPU.
            limit = {**PARTS, **SEVERAL}[name][1] * (4 if given.tiny else 1)
            results[name] = run_part(name, given, env, min(left, limit))
            print(f"{results[name]['seconds']} s, {'; '.join(wrong(results[name])) or 'as expected'}", flush=True)
        write(path, json.dumps(results, indent=1))
        write(given.out / "results.md", markdown(results, tiny=given.tiny))
    if left_out:
        print(f"{LEFT_OUT}: {', '.join(left_out)} (go on with --from {left_out[0]})")
    return 1 if any(wrong(results[name]) for name in given.names) else 0


if __name__ == "__main__":
    sys.exit(main())
