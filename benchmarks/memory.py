"""Predicted against measured peaks of memory: the table of docs/validate.md, on this machine's CPU or GPU.

Every line is a run of three steps with the plugin ``memory``. The plugin predicts before the first step and then
measures: on a CPU every allocation that torch's profiler records, on a GPU the allocator's own statistics. The last two
runs have two processes, and ``--compile``, for which the prediction is a bound. The last line predicts a model of 1.3
billion parameters in a process of its own, and prints the time and the peak memory of that process.

    python benchmarks/memory.py [--compile] [--only WORD]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = {
    "model.n_embd": 128,
    "model.n_layer": 4,
    "model.n_head": 4,
    "model.vocab_size": 2048,
    "data.source": "stories",
    "data.tokenizer": "bytes",
    "data.max_length": 256,
    "data.max_documents": 600,
    "optimizer.warmup_steps": 1,
    "training.max_steps": 3,
    "training.per_device_batch_size": 4,
    "training.gradient_accumulation_steps": 2,
    "training.mixed_precision": "no",
    "training.compile": "false",
    "training.gradient_checkpointing": "false",
    "training.eval_steps": 0,
    "training.save_steps": 0,
}
BF16 = {"training.mixed_precision": "bf16"}
CHECKPOINTING = {"training.gradient_checkpointing": "true"}
GPT2 = {"model.norm": "layernorm", "model.mlp_type": "mlp", "model.activation": "gelu", "model.position": "learned"}
LARGE_VOCABULARY = {"model.vocab_size": 16384}

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, checkpointing": CHECKPOINTING,
    "fp32, checkpointing every second block": {"training.gradient_checkpointing": 2},
    "bf16": BF16,
    "bf16, checkpointing": BF16 | CHECKPOINTING,
    "accumulation 1": {"training.gradient_accumulation_steps": 1},
    "no clipping": {"optimizer.max_grad_norm": "null"},
    "2 key/value heads, untied head": {"model.n_kv_head": 2, "model.tie_word_embeddings": "false"},
    "LayerNorm, plain MLP, learned positions, biases": GPT2 | {"model.use_bias": "true"},
    "the same, bf16, checkpointing": GPT2 | {"model.use_bias": "true"} | BF16 | CHECKPOINTING,
    "document mask": {"data.document_mask": "true"},
    "document mask, bf16, packed by best_fit": {"data.document_mask": "true", "data.packing": "best_fit"} | BF16,
    "dropout": {"model.dropout": 0.1},
    "dropout, bf16, checkpointing": {"model.dropout": 0.1} | BF16 | CHECKPOINTING,
    "width 256, qk_norm": {"model.n_embd": 256, "model.qk_norm": "true"},
    "one row of 1,024": {"data.max_length": 1024, "training.per_device_batch_size": 1},
    "vocabulary of 16,384": LARGE_VOCABULARY,
    "vocabulary of 16,384, bf16, batch 8": LARGE_VOCABULARY | BF16 | {"training.per_device_batch_size": 8},
    "saved in the background": {"training.background_save": "true", "training.save_steps": 1},
    "fp32, 2 processes": {},
}

LARGE = """
import resource
import gpt_simple as g
from gpt_simple.preflight.memory import predict_memory
config = g.Config(
    model=g.ModelConfig(n_embd=2048, n_layer=24, n_head=16),
    data=g.DataConfig(max_length=2048),
    training=g.TrainingConfig(per_device_batch_size=4),
)
prediction = predict_memory(config, vocab_size=50257, precision="bf16")
parameters = prediction.by_category["parameters"] / 4e9
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{parameters:.2f} billion parameters need {prediction.peak / 2**30:.1f} GiB; {most:,.0f} MiB were used", end="")
"""


def measure(overrides: dict[str, Any], processes: int, directory: str) -> dict[str, float]:
    """Predicted and measured bytes of one run."""
    out = Path(directory, "out")
    values = BASE | overrides | {"training.output_dir": str(out)}
    several = ["--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "gpt_simple", "run", *(f"--{key}={value}" for key, value in values.items())]
    subprocess.run([*command, *several, "-p", "memory", "-p", "no:sample", "-q"], check=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row: dict[str, float] = next(row for row in rows if row.get("name") == "memory")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile every run: predictions are bounds then")
    parser.add_argument("--only", default="", help="cases with this in their names")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| run | predicted MiB | measured MiB | error |\n|---|---|---|---|", flush=True)
    for name, overrides in CASES.items():
        if arguments.only not in name:
            continue
        compiled = {"training.compile": "true"} if arguments.compile else {}
        with tempfile.TemporaryDirectory() as directory:
            row = measure(overrides | compiled, 2 if "processes" in name else 1, directory)
        predicted, measured = (row[key] / 2**20 for key in ("predicted", "measured"))
        print(f"| {name} | {predicted:.1f} | {measured:.1f} | {row['error']:+.2%} |", flush=True)
    if not arguments.only:
        begin = time.perf_counter()
        line = subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True).stdout
        print(f"\n{line} and {time.perf_counter() - begin:.0f} s for the prediction, with the start of Python")


if __name__ == "__main__":
    main()
