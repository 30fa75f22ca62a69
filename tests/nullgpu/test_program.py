"""The whole program on the null GPU: what it does for a user, and when it waits for the device."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.nullgpu.device import CARDS, HERE, NullGpu
from tests.nullgpu.events import between, kind, read_log, waits

CONFIG = """\
[model]
n_embd = 128
n_layer = 2
n_head = 2

[data]
source = "stories"
tokenizer = "bytes"
max_length = 128
max_documents = 400
num_workers = 1

[training]
max_steps = 4
per_device_batch_size = 2
gradient_accumulation_steps = 2
logging_steps = 2
eval_steps = 2
max_eval_batches = 2
save_steps = 2
output_dir = "out"

[optimizer]
warmup_steps = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


def launch(gpu: NullGpu, folder: Path, *options: object, code: int = 0, processes: int = 1, **variables: str) -> str:
    """``gpt-simple run config.toml`` with these options, and what it printed."""
    several = ["--nproc_per_node", processes] if processes > 1 else []
    arguments = ["-m", "gpt_simple", "run", "config.toml", *map(str, several), *map(str, options)]
    done = gpu.run(arguments, gpu.environment(count=processes, **variables), cwd=folder)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def logged(folder: Path) -> list[str]:
    """The events of the process that trained."""
    (log,) = [log for log in map(read_log, folder.glob("events.*")) if "mark step 1" in log]
    return log


@pytest.mark.parametrize(("gib", "recomputed"), [("79", "no block"), ("1.56", "every block")])
def test_auto_checkpointing_follows_the_card(gpu: NullGpu, folder: Path, gib: str, recomputed: str) -> None:
    options = ("--training.gradient_checkpointing", "auto", "--training.compile", "false")
    printed = launch(gpu, folder, *options, NULLGPU_GIB=gib)
    assert f"recompute  {recomputed} (auto: without it " in printed


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_trains_evaluates_saves_resumes_and_samples(gpu: NullGpu, folder: Path, compiled: bool, processes: int) -> None:
    options = ("--training.compile", str(compiled).lower())
    first = launch(gpu, folder, *options, processes=processes)
    assert "completed: finished all 4 steps" in first
    second = launch(gpu, folder, *options, "--training.max_steps", 6, processes=processes)
    assert "resumed from step 4" in second
    assert "completed: finished all 6 steps" in second
    facts = json.loads((folder / "out/run.json").read_text())["facts"]["run"]
    assert (facts["device"], facts["precision"]) == (CARDS["h100"].name, "bf16")
    assert (facts["compile"] != "off") is compiled
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [2, 4, 6]
    saved = sorted(path.name for path in (folder / "out/checkpoints").iterdir() if path.name.startswith("step-"))
    assert saved[-1] == "step-00000006"
    sampled = gpu.run(["-m", "gpt_simple", "sample", "out", "--prompt", "Once"], cwd=folder)
    assert sampled.returncode == 0, sampled.stderr
    assert "Once" in sampled.stdout


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "document mask"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_between_logging_points_does_not_wait(
    gpu: NullGpu, folder: Path, compiled: bool, documents: bool
) -> None:
    changes = {"max_steps": 8, "logging_steps": 4, "eval_steps": 0, "save_steps": 0, "compile": str(compiled).lower()}
    options = [f"--training.{name}={value}" for name, value in changes.items()]
    options += [f"--data.document_mask={str(documents).lower()}", "-p", str(HERE / "marks.py")]
    launch(gpu, folder, *options, NULLGPU_LOG=str(folder / "events"))
    events = logged(folder)
    assert waits(between(events, "step 2", "end of step 4")) == []
    assert waits(between(events, "step 6", "end of step 8")) == []
    reads = [event for event in between(events, "end of step 4", "step 5") if kind(event) == "copy D>H"]
    assert len(reads) == 2, "the numbers of the steps, and the reduced metrics"


def test_out_of_memory_ends_the_run_and_not_its_directory(gpu: NullGpu, folder: Path) -> None:
    big = ("--training.compile=false", "--training.per_device_batch_size=64", "--model.vocab_size=50304")
    small = launch(gpu, folder, *big, code=1, NULLGPU_GIB="0.6")
    assert re.search("out ?of ?memory", small, re.IGNORECASE)
    assert json.loads((folder / "out/status.json").read_text())["state"] == "failed"
    assert "completed: finished all 4 steps" in launch(gpu, folder, *big)
