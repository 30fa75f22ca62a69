"""The whole program on the null GPU: what it does for a user, and when it waits for the device."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.nullgpu.device import CARDS, HERE, NullGpu
from tests.nullgpu.events import allocations, between, kind, read_log, waits

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


def test_a_sharded_model_trains_saves_resumes_and_samples(gpu: NullGpu, folder: Path) -> None:
    """Compiled in bf16, and then eager in fp16."""
    options = ("--training.parallel", "fsdp", "--training.background_save", "true")
    first = launch(gpu, folder, *options, processes=2)
    assert "completed: finished all 4 steps" in first
    assert "each block is compiled" in first
    options = (*options, "--training.mixed_precision", "fp16", "--training.compile", "false")
    second = launch(gpu, folder, *options, "--training.max_steps", 6, processes=2)
    assert "resumed from step 4" in second
    assert "completed: finished all 6 steps" in second
    facts = json.loads((folder / "out/run.json").read_text())["facts"]["run"]
    assert (facts["device"], facts["precision"], facts["parallel"]) == (CARDS["h100"].name, "fp16", "fsdp")


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


@pytest.mark.parametrize("background", [None, "false"], ids=["by default", "switched off"])
def test_a_save_waits_for_the_device_once(gpu: NullGpu, folder: Path, background: str | None) -> None:
    changes = {"max_steps": 4, "logging_steps": 0, "eval_steps": 0, "save_steps": 2, "compile": "false"}
    options = [f"--training.{name}={value}" for name, value in changes.items()] + ["-p", str(HERE / "marks.py")]
    options += [] if background is None else [f"--training.background_save={background}"]
    launch(gpu, folder, *options, NULLGPU_LOG=str(folder / "events"))
    saved = list(safe_open(folder / "out/checkpoints/step-00000002/model.safetensors", "pt").keys())
    save = between(logged(folder), "end of step 2", "step 3")
    copies = [event for event in save if kind(event) == "copy D>H"]
    assert len(copies) >= 3 * len(saved), "weights and two moments"
    if background is None:
        assert {event.rpartition(" ")[0] for event in copies} == {"copy async D>pinned"}
        waited = [event for event in save if event.startswith("sync")]
        assert waited == ["sync device", "sync stream"], "the steps before are timed, and the copies are there"
        assert len(allocations(save)) == 1, "one piece of page-locked memory"
    else:
        assert len([event for event in save if event.startswith("sync")]) >= len(copies)


BACKEND, VARIABLE = "--training.compile_backend=cudagraphs", {"TORCHINDUCTOR_CUDAGRAPHS": "1"}


@pytest.mark.parametrize(
    ("options", "variables", "replays"),
    [
        ([BACKEND], {}, 6),
        ([], VARIABLE, 6),
        (["--training.compile_scope=blocks", "--training.gradient_checkpointing=false"], VARIABLE, 12),
        (["--data.document_mask=true"], VARIABLE, 6),
        (["--model.dropout=0.1", "--training.gradient_checkpointing=false"], VARIABLE, 6),
    ],
    ids=["backend", "variable", "blocks", "document mask", "dropout"],
)
def test_cuda_graphs_are_replayed_and_not_overwritten(
    gpu: NullGpu, folder: Path, options: list[str], variables: dict[str, str], replays: int
) -> None:
    """Three micro-batches of two layers, each with a forward and a backward."""
    changes = {"max_steps": 20, "gradient_accumulation_steps": 3, "logging_steps": 5, "eval_steps": 4, "save_steps": 0}
    options = [*options, *(f"--training.{name}={value}" for name, value in changes.items())]
    log = {"NULLGPU_LOG": str(folder / "events")}
    shown = launch(gpu, folder, *options, "-p", HERE / "marks.py", **variables, **log)
    assert "completed: finished all 20 steps" in shown
    events = between(logged(folder), "step 18", "end of step 18")
    assert sum(kind(event) == "graph" for event in events) == replays
    assert [event for event in events if event == "capture" or event.startswith("kernel triton")] == []
    assert waits(events) == []


def test_out_of_memory_ends_the_run_and_not_its_directory(gpu: NullGpu, folder: Path) -> None:
    big = ("--training.compile=false", "--training.per_device_batch_size=64", "--model.vocab_size=50304")
    small = launch(gpu, folder, *big, code=1, NULLGPU_GIB="0.6")
    assert re.search("out ?of ?memory", small, re.IGNORECASE)
    assert json.loads((folder / "out/status.json").read_text())["state"] == "failed"
    assert "completed: finished all 4 steps" in launch(gpu, folder, *big)


STOPS = """\
import os, signal
from gpt_simple.hooks import NoConfig, Plugin, hookimpl

class Stops(Plugin[NoConfig]):
    ranks = "all"

    @hookimpl
    def on_step_start(self, run, event):
        if event.step == 2 and run.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_processes_meet_before_they_wait_for_the_device(gpu: NullGpu, folder: Path) -> None:
    """The gradients of step 2, a logging point, never come: a device would wait for them without an end."""
    (folder / "stops.py").write_text(STOPS)
    options = ("--training.compile=false", "--training.peer_timeout_seconds=5", "-p", str(folder / "stops.py"))
    ended = launch(gpu, folder, *options, code=1, processes=2)
    assert "error: process 1 did not come to the end of step" in ended
    assert "step=2 " not in ended
    assert '"step": 2' not in (folder / "out/metrics.jsonl").read_text()
