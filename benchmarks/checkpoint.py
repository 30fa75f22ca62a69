"""What a checkpoint costs: a blocking save against its parts, and how long training pauses for one in the background.

    python benchmarks/checkpoint.py [MiB]

The parts are writing the same tensors with safetensors, hashing and syncing them, one after another. Rounds alternate,
so that a busy machine is busy for all of them; medians are printed.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpt_simple.checkpoint.store import Store
from gpt_simple.engine.background import BackgroundWriter

ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    third = size * 2**20 // 4 // 3 // 8
    model = {f"blocks.{i}.weight": torch.randn(third) for i in range(8)}
    moments = {f"{kind}.{name}": tensor.clone() for kind in ("exp_avg", "exp_avg_sq") for name, tensor in model.items()}
    tensors = {"model": model, "optimizer": moments}
    times: dict[str, list[float]] = {"parts": [], "save": [], "pause": []}
    with tempfile.TemporaryDirectory(dir=".") as directory:
        root = Path(directory)
        store, behind = Store(root / "blocking"), Store(root / "background")
        writer = BackgroundWriter(behind, model)

        def parts() -> None:
            for stem, group in tensors.items():
                path = root / f"{stem}.safetensors"
                save_file(group, path)
                with path.open("rb") as file:
                    hashlib.file_digest(file, "sha256")
                    os.fsync(file.fileno())

        # Round 0 makes the copies and warms up.
        for step in range(ROUNDS + 1):
            times["parts"].append(seconds(parts))
            times["save"].append(seconds(lambda: store.publish(step, tensors=tensors, documents={})))  # noqa: B023
            times["pause"].append(seconds(lambda: writer.begin(step, tensors, {})))  # noqa: B023
            writer.landed(wait=True)
            for each in (store, behind):
                for old in each.list()[:-1]:
                    each.delete(old)
        writer.close()
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"{size} MiB, {ROUNDS} rounds: parts {medians['parts']:.2f} s, save {medians['save']:.2f} s,", end=" ")
    print(f"pause with background_save {medians['pause']:.3f} s")
    print(
        f"save / parts {medians['save'] / medians['parts']:.2f}   pause / save {medians['pause'] / medians['save']:.3f}"
    )


if __name__ == "__main__":
    main()
