"""Cost of checkpoints.

    python benchmarks/checkpoint.py parts [--mib 240]   a blocking save against its parts
    python benchmarks/checkpoint.py pause               how long training waits for a blocking and a background save
    python benchmarks/checkpoint.py resume              from process start to the first step: cold against resumed

The parts are writing the same tensors with safetensors, hashing and syncing them, one after another. The fastest rounds
are compared; medians are printed too.

A pause is the time from the end of a step to the beginning of the next, without that of a boundary that does not save.
So it includes retention and the plugins' hooks. The runs train a model of 10 million parameters.

A resume is measured at step 20, and from the same checkpoint renumbered to step 1,000,020.

All rounds alternate, so that other load on the machine affects every side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import gpt_simple
from gpt_simple import Plugin, hookimpl
from gpt_simple.checkpoint.store import Store

FAR = 1_000_000


class Pauses(Plugin[Any]):
    """Measures the seconds between two steps, by the number of the first."""

    on_error = "abort"
    after = ("console", "metrics", "throughput", "evaluate", "checkpoint", "sample")

    def __init__(self) -> None:
        super().__init__(None)
        self.ended = 0.0
        self.seconds: dict[int, float] = {}

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.ended = time.perf_counter()

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        if self.ended:
            self.seconds[event.step - 1] = time.perf_counter() - self.ended


def run(directory: Path, plugins: Sequence[Plugin[Any]] = (), **training: Any) -> None:
    gpt_simple.train(
        model={"n_embd": 320, "n_layer": 8, "n_head": 5},
        data={"source": "stories", "tokenizer": "bytes", "max_length": 64, "max_documents": 2000},
        training={
            "per_device_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "compile": False,
            "gradient_checkpointing": False,
            "eval_steps": None,
            "mixed_precision": "no",
            "output_dir": str(directory),
        }
        | training,
        overrides={"plugins.console.progress": "lines"},
        plugins=plugins,
    )


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def medians_of(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(statistics.median(each), 4) for name, each in values.items()}


def parts(root: Path, mib: int, rounds: int) -> dict[str, float]:
    third = mib * 2**20 // 4 // 3 // 8
    model = {f"blocks.{i}.weight": torch.randn(third) for i in range(8)}
    moments = {f"{kind}.{name}": tensor.clone() for kind in ("exp_avg", "exp_avg_sq") for name, tensor in model.items()}
    tensors = {"model": model, "optimizer": moments}
    store = Store(root / "checkpoints")
    times: dict[str, list[float]] = {"parts": [], "save": []}

    def one_after_another(directory: Path) -> None:
        directory.mkdir()
        for stem, group in tensors.items():
            path = directory / f"{stem}.safetensors"
            save_file(group, path)
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
                os.fsync(file.fileno())

    # Memory and disk blocks that were never used are several times slower. So both sides keep their newest two, take
    # turns in going first, and are compared by their fastest rounds.
    for step in range(rounds):
        calls = {
            "parts": partial(one_after_another, root / f"parts-{step}"),
            "save": partial(store.publish, step, tensors=tensors, documents={}),
        }
        for name in sorted(calls, reverse=step % 2 == 1):
            times[name].append(seconds(calls[name]))
        shutil.rmtree(root / f"parts-{step - 2}", ignore_errors=True)
        store.prune(1)
    fastest = {f"{name}_min": round(min(each), 4) for name, each in times.items()}
    return medians_of(times) | fastest | {"ratio": round(min(times["save"]) / min(times["parts"]), 3)}


def pause(root: Path, rounds: int) -> dict[str, float]:
    """Saves every 20 steps, logs every 10. The first background save of a run allocates the copy and counts apart."""
    times: dict[str, list[float]] = {"blocking": [], "background": [], "first_in_background": []}
    for number in range(rounds):
        for name in ("blocking", "background"):
            pauses = Pauses()
            behind = name == "background"
            run(root / f"{name}-{number}", [pauses], max_steps=141, save_steps=20, background_save=behind)
            usual = statistics.median(time for step, time in pauses.seconds.items() if step % 10)
            costs = [
                # A background save is polled at the next logging step, 10 steps later. Logging counts on both sides.
                pauses.seconds[step] + pauses.seconds[step + 10] - 2 * usual
                for step in range(20, 140, 20)
            ]
            if behind:
                times["first_in_background"].append(costs[0])
            times[name] += costs[1:]
            shutil.rmtree(root / f"{name}-{number}")
    medians = medians_of(times)
    return medians | {"ratio": round(medians["background"] / medians["blocking"], 3)}


def resume(root: Path, rounds: int) -> dict[str, float]:
    early, late = root / "early", root / "late"
    run(early, max_steps=20)
    _far_away(early, late)
    times: dict[str, list[float]] = {"cold": [], "resumed_at_20": [], f"resumed_at_{FAR + 20}": []}
    for _ in range(rounds):
        for name, source, step in zip(times, (None, early, late), (0, 20, FAR + 20), strict=True):
            work = root / "work"
            if source is not None:
                shutil.copytree(source, work)
            times[name].append(_first_step(work, step))
            shutil.rmtree(work)
    medians = medians_of(times)
    cold = medians["cold"]
    return medians | {f"ratio_{name}": round(value / cold, 3) for name, value in medians.items() if name != "cold"}


def _far_away(source: Path, target: Path) -> None:
    """Copy the run, with its checkpoint renumbered to a million steps later."""
    (checkpoint,) = Store(source / "checkpoints").list()
    state, plugins = (json.loads((checkpoint.path / f"{stem}.json").read_text()) for stem in ("state", "plugins"))
    tokens = state["tokens"] // state["step"]
    state["step"] += FAR
    for name in ("tokens", "target_tokens"):
        state[name] += FAR * tokens
    state["samples"] += FAR * tokens // 64
    tensors = {stem: load_file(checkpoint.path / f"{stem}.safetensors") for stem in ("model", "optimizer", "plugins")}
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("step-*"))
    Store(target / "checkpoints").publish(
        state["step"], tensors=tensors, documents={"state": state, "plugins": plugins}
    )


class FirstStep(Plugin[Any]):
    """Ends the process after the first step."""

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        os._exit(0)


def _first_step(directory: Path, step: int) -> float:
    """Seconds of a process that runs one step."""
    command = [sys.executable, __file__, "first-step", "--directory", str(directory), "--max-steps", str(step + 1000)]
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parts", "pause", "resume", "first-step"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--max-steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "first-step":
        run(arguments.directory, [FirstStep(None)], max_steps=arguments.max_steps)
        return
    with tempfile.TemporaryDirectory(dir=".") as directory:
        root, rounds = Path(directory), arguments.rounds
        work = {
            "parts": lambda: parts(root, arguments.mib, rounds),
            "pause": lambda: pause(root, rounds),
            "resume": lambda: resume(root, rounds),
        }[arguments.what]
        print(json.dumps(work(), indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
