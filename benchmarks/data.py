"""Speed of the data path. Each figure is compared with a bare equivalent in the same process, in turns.

    python benchmarks/data.py [--megabytes 32]

It prints JSON:

- MB/s of `gpt-simple tokenize` as a whole process, with one and two workers, against bare tiktoken with the same merges
  on the same text in memory, with one and two threads (medians of the ratios within a round)
- the batch call of `tokenizers` against tiktoken, on an eighth of the text
- tokens/s of the loader against a numpy gather of the same rows, each read once, into the same kind of tensors
- microseconds and peak memory of a cold resume at 0, 10^6 and 10^12 tokens (of the whole run, in rows of 1,024):
  building the order of a mixture of two phases without a cache, and locating the next 64 rows
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from attrs import evolve

from gpt_simple import Config, DataConfig
from gpt_simple.config.schema import Phase
from gpt_simple.data.encoder import tiktoken_encoding
from gpt_simple.data.loader import Loader
from gpt_simple.data.mixture import _period, mixture
from gpt_simple.data.prepare import order_seed, prepare
from gpt_simple.data.sources.python_stdlib import build
from gpt_simple.data.tokenizer import JsonTokenizer, bpe
from gpt_simple.hooks.components import builtin_registry

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--megabytes", type=float, default=32)
arguments = parser.parse_args()
ROUNDS = 7


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """The seconds of each call. Every round measures all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def ratio(bare: list[float], ours: list[float]) -> float:
    """Our speed over the bare one: the median over rounds, within which the load of the machine is similar."""
    return round(statistics.median(a / b for a, b in zip(bare, ours, strict=True)), 3)


def library(megabytes: float) -> list[str]:
    """The standard library's sources, repeated if necessary. No two texts are equal."""
    sources = [document.text for document in build(DataConfig(), 0).documents()]
    texts: list[str] = []
    left = megabytes * 1e6
    while left > 0:
        text = f"{sources[len(texts) % len(sources)]}# {len(texts)}\n"
        texts.append(text)
        left -= len(text.encode())
    return texts


def tokenizing(root: Path) -> dict[str, float]:
    texts = library(arguments.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = bpe(evolve(DataConfig(), tokenizer_vocab_size=8192), lambda: iter(texts[:100]))
    assert isinstance(tokenizer, JsonTokenizer)
    raw, out = root / "raw", root / "out"
    raw.mkdir()
    (raw / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save(root / "tokenizer")
    bare = tiktoken_encoding(json.loads(tokenizer.backend.to_str()))
    assert bare is not None
    command = [sys.executable, "-m", "gpt_simple", "tokenize", f"--input_dir={raw}", f"--output_dir={out}"]

    def ours(workers: int) -> None:
        shutil.rmtree(out, ignore_errors=True)
        options = [f"--tokenizer_path={root / 'tokenizer'}", f"--num_workers={workers}"]
        subprocess.run([*command, *options], check=True, capture_output=True)

    taken = in_turns(
        {
            "tiktoken, 1 thread": lambda: [bare.encode_ordinary(text) for text in texts],
            "command, 1 worker": lambda: ours(1),
            "tiktoken, 2 threads": lambda: bare.encode_ordinary_batch(texts, num_threads=2),
            "command, 2 workers": lambda: ours(2),
        }
    )
    few = texts[: len(texts) // 8]
    libraries = in_turns(
        {
            "tiktoken": lambda: [bare.encode_ordinary(text) for text in few],
            "tokenizers": lambda: tokenizer.backend.encode_batch_fast(few, add_special_tokens=False),
        }
    )
    few_size = sum(len(text.encode()) for text in few) / 1e6
    speeds = {f"{name}, MB/s": round(size / min(times), 2) for name, times in taken.items()}
    return speeds | {
        "tokenizers, 1 thread, MB/s": round(few_size / min(libraries["tokenizers"]), 2),
        "tokenizers / tiktoken, 1": ratio(libraries["tiktoken"], libraries["tokenizers"]),
        "command / tiktoken, 1": ratio(taken["tiktoken, 1 thread"], taken["command, 1 worker"]),
        "command / tiktoken, 2": ratio(taken["tiktoken, 2 threads"], taken["command, 2 workers"]),
    }


def loading(root: Path) -> dict[str, float]:
    length, batch, count = 1024, 16, 400
    config = Config()
    data = evolve(config.data, path=str(root / "out"), max_length=length, num_workers=0)
    training = evolve(config.training, per_device_batch_size=batch, gradient_accumulation_steps=1)
    config = evolve(config, data=data, training=training)
    dataset = prepare(config, builtin_registry(), require_val=False)
    split = dataset.train
    tokens = split.parts[0].shard.tokens
    order = dataset.order(config.data, order_seed(config))
    # The last row may be short. The gather leaves it out.
    rows = order.locate(np.arange(count * batch)) % (len(tokens) // length - 1)

    def ours() -> None:
        loader = Loader(dataset, config)
        for _ in range(count):
            loader.next_step()

    def gather() -> None:
        offsets = np.arange(length + 1)
        for index in range(count):
            places = rows[index * batch : (index + 1) * batch, None] * length + offsets
            windows = torch.from_numpy(tokens[places].astype(np.int64))
            _inputs, _targets = windows[:, :-1], windows[:, 1:]

    taken = in_turns({"ours": ours, "gather": gather})
    speeds = {
        f"{name}, M tokens/s": round(count * batch * length / min(times) / 1e6, 1) for name, times in taken.items()
    }
    return speeds | {"ours / gather": ratio(taken["gather"], taken["ours"])}


def ordering() -> dict[str, float]:
    """A cold resume of a mixture of two phases: in the first one, and far beyond the end of any run."""
    length, batch = 1024, 64
    buckets = {"web": 10**8, "code": 10**7}
    phases = (Phase(10**9, {"web": 3.0, "code": 1.0}), Phase(10**12, {"web": 1.0, "code": 1.0}))

    def resume(tokens: int) -> None:
        # The table of 65,536 slots, which a new process does not have.
        _period.cache_clear()
        order = mixture(buckets, phases, "repeat", max_length=length, seed=1)
        order.locate(np.arange(tokens // length, tokens // length + batch))

    found: dict[str, float] = {}
    for name, tokens in (("0", 0), ("10^6", 10**6), ("10^12", 10**12)):
        resume(tokens)  # exclude numpy's warm-up
        times = [seconds(partial(resume, tokens)) for _ in range(100)]
        found[f"us at {name} tokens"] = round(1e6 * statistics.median(times), 1)
        tracemalloc.start()
        resume(tokens)
        found[f"peak KiB at {name} tokens"] = round(tracemalloc.get_traced_memory()[1] / 1024, 1)
        tracemalloc.stop()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figures = {"tokenize": tokenizing(Path(folder)), "loader": loading(Path(folder)), "order": ordering()}
    print(json.dumps(figures, indent=1))
