"""What the data path costs: each figure beside the bare thing that it wraps, in one process, in turns.

    python benchmarks/data.py [--megabytes 8]

Reported as JSON: MB/s of `tokenize` with one process against bare tiktoken in one thread on the same text and merges,
and `tokenizers`' own batch call; tokens/s of the loader against a bare numpy gather of the same rows into the same kind
of tensors; microseconds and peak memory of locating a batch at sample 0 and at sample 10^12.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
from gpt_simple.data.bulk import Job, tokenize
from gpt_simple.data.corpus import find_units
from gpt_simple.data.loader import Loader
from gpt_simple.data.mixture import mixture
from gpt_simple.data.parts import Settings, make_part
from gpt_simple.data.prepare import order_seed, prepare
from gpt_simple.data.sources.python_stdlib import build
from gpt_simple.data.tokenizer import JsonTokenizer, bpe
from gpt_simple.hooks.components import builtin_registry

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--megabytes", type=float, default=8)
arguments = parser.parse_args()
ROUNDS = 7


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turns(**calls: Callable[[], Any]) -> dict[str, float]:
    """The best time of each, all measured in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: min(taken) for name, taken in times.items()}


def tokenizing(root: Path) -> dict[str, float]:
    texts, size = [], 0
    for document in build(DataConfig(), 0).documents():
        texts.append(document.text)
        size += len(document.text.encode())
        if size > arguments.megabytes * 1e6:
            break
    tokenizer = bpe(evolve(DataConfig(), tokenizer_vocab_size=8192), lambda: iter(texts[:100]))
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer._merges is not None
    raw, parts = root / "raw", root / "parts"
    for folder in (raw, parts):
        folder.mkdir()
    (raw / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save(root / "tokenizer")
    settings = Settings(parts, root / "tokenizer", tokenizer.fingerprint, "text")
    units = find_units(raw)
    bare = tokenizer._merges.encoding

    def ours() -> None:
        for unit in units:
            make_part(unit, settings)

    taken = in_turns(
        ours=ours,
        tiktoken=lambda: [bare.encode_ordinary(text) for text in texts],
        tokenizers=lambda: tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False),
    )
    job = Job(raw, root / "out", tokenizer=str(root / "tokenizer"))
    whole = seconds(lambda: tokenize(job, lambda message: None, lambda done, total: None))
    speeds = {f"{name} MB/s": round(size / 1e6 / time, 2) for name, time in (*taken.items(), ("whole command", whole))}
    return speeds | {
        "ours / tiktoken": round(taken["tiktoken"] / taken["ours"], 3),
        "tokenizers / tiktoken": round(taken["tiktoken"] / taken["tokenizers"], 3),
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
    # The last row may be short; the gather is spared it.
    rows = order.locate(np.arange(count * batch)) % (len(tokens) // length - 1)

    def ours() -> None:
        loader = Loader(dataset, config)
        for _ in range(count):
            loader.next_step()

    def gather() -> None:
        offsets = np.arange(length)
        for index in range(count):
            begin = rows[index * batch : (index + 1) * batch, None] * length + offsets
            torch.from_numpy(tokens[begin].astype(np.int64))
            torch.from_numpy(tokens[begin + 1].astype(np.int64))

    taken = in_turns(ours=ours, gather=gather)
    speeds = {f"{name} M tokens/s": round(count * batch * length / time / 1e6, 1) for name, time in taken.items()}
    return speeds | {"ours / gather": round(taken["gather"] / taken["ours"], 3)}


def ordering() -> dict[str, float]:
    """64 samples of a mixture of two buckets, from the start and from a sample that no run will reach."""
    from gpt_simple.config.schema import Phase

    phases = (Phase(1 << 40, {"web": 3.0, "code": 1.0}), Phase(1 << 40, {"web": 1.0, "code": 1.0}))
    order = mixture({"web": 10**8, "code": 10**7}, phases, "repeat", max_length=1024, seed=1)
    found: dict[str, float] = {}
    for name, first in (("0", 0), ("10^6", 10**6), ("10^12", 10**12)):
        samples = np.arange(first, first + 64)
        order.locate(samples)
        times = [seconds(partial(order.locate, samples)) for _ in range(300)]
        found[f"us at {name}"] = round(1e6 * statistics.median(times), 1)
        tracemalloc.start()
        order.locate(samples)
        found[f"peak KiB at {name}"] = round(tracemalloc.get_traced_memory()[1] / 1024, 1)
        tracemalloc.stop()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figures = {"tokenize": tokenizing(Path(folder)), "loader": loading(Path(folder)), "order": ordering()}
    print(json.dumps(figures, indent=1))
