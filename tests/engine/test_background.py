"""Background checkpoints have the bytes of their own step, and are written one at a time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt_simple import Config, TrainingConfig
from gpt_simple.checkpoint.draft import Draft, Published
from gpt_simple.checkpoint.store import Store
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.background import BackgroundWriter, NotFinite
from gpt_simple.engine.checkpointer import Checkpointer
from gpt_simple.run_dir.lineage import read_metrics
from tests.children import At, At2, Ended, full_disk_until, kill_self
from tests.tiny import TinyRun

OPTIONS: dict[str, Any] = {
    "training__max_steps": 12,
    "training__save_steps": 3,
    "training__logging_steps": 1,
    "training__keep_last_k": None,
    "model__dropout": 0.1,
}
IN_BACKGROUND = OPTIONS | {"training__background_save": True}


def content(directory: Path) -> dict[str, bytes]:
    files = directory.glob("checkpoints/step-*/*.safetensors")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


class Slowly:
    """Publishing takes until ``go`` is set; ``most`` were on their way at one time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.now, self.most = threading.Event(), 0, 0
        self.real = Store.publish
        slowly = self

        def publish(store: Store, step: int, **content: Any) -> Published:
            slowly.now += 1
            slowly.most = max(slowly.most, slowly.now)
            assert slowly.go.wait(30)
            published = slowly.real(store, step, **content)
            slowly.now -= 1
            return published

        monkeypatch.setattr(Store, "publish", publish)


def test_every_checkpoint_has_the_bytes_of_its_own_step(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when training has gone on by two steps before anything is written."""
    tiny("waits", **OPTIONS)
    slowly = Slowly(monkeypatch)
    opener = At("on_step_end", 5, lambda run: slowly.go.set())
    result = tiny("goes_on", plugins=[opener], **IN_BACKGROUND)
    assert result.status == "completed"
    assert content(tmp_path / "goes_on") == content(tmp_path / "waits")
    assert slowly.most == 1
    rows = read_metrics(tmp_path / "goes_on/metrics.jsonl")
    saved = [Path(row["path"]).name for row in rows if row.get("name") == "checkpoint"]
    assert saved == [f"step-{step:08d}" for step in (3, 6, 9, 12)]


def test_a_save_that_fails_is_logged_and_tried_again(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny(plugins=[full_disk_until(7, monkeypatch)], **IN_BACKGROUND)
    assert result.status == "completed"
    rows = read_metrics(result.output_dir / "metrics.jsonl")
    names = [row["name"] for row in rows if row["kind"] == "event"]
    assert "checkpoint_failed" in names
    assert result.checkpoint_path is not None


def test_a_time_budget_learns_from_a_background_save(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the last checkpoint, which may have to wait for one that is on its way, comes too late."""
    real = Draft.add_tensors

    def add_tensors(self: Draft, stem: str, tensors: Any) -> None:
        time.sleep(0.2)
        real(self, stem, tensors)

    monkeypatch.setattr(Draft, "add_tensors", add_tensors)
    budget = {"training__max_runtime_seconds": 5, "training__walltime_reserve_seconds": 0}
    result = tiny(**IN_BACKGROUND | {"training__max_steps": 10**6}, **budget)
    kept = re.search(r"the time budget is used up \(.*; (\d+) s are kept for the last checkpoint\)", result.reason)
    assert result.status == "stopped"
    assert kept is not None
    assert int(kept[1]) >= 2, "1.5 times two saves of 0.6 s and more"


def test_a_kill_during_a_save_costs_only_that_checkpoint(
    apart: Callable[..., Ended], tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("whole", **OPTIONS)
    with monkeypatch.context() as patch:
        slowly = Slowly(patch)
        slowly.go.set()
        closer = At("on_step_end", 5, lambda run: slowly.go.clear())
        ended = apart("parts", plugins=[closer, At2("on_step_start", 8, kill_self)], **IN_BACKGROUND)
    assert (ended.code, ended.steps) == (-9, [3])
    tiny("parts", **IN_BACKGROUND)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_buffer_may_hold_an_infinity(tmp_path: Path) -> None:
    writer = BackgroundWriter(Store(tmp_path))
    tensors = {"weight": torch.ones(3), "mask": torch.tensor([0.0, -torch.inf])}
    writer.begin(1, {"model": tensors}, {}, must_be_finite={"weight"})
    assert writer.result(wait=True) is not None
    tensors["weight"][1] = torch.nan
    writer.begin(2, {"model": tensors}, {}, must_be_finite={"weight"})
    with pytest.raises(NotFinite):
        writer.result(wait=True)
    writer.close()
    assert [checkpoint.step for checkpoint in Store(tmp_path).list()] == [1]


def test_a_group_without_tensors_stays_and_shapes_may_change(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writer = BackgroundWriter(store)
    for step, size in ((1, 3), (2, 5)):
        tensors = {"model": {"weight": torch.arange(float(size))}, "plugins": {}}
        writer.begin(step, tensors, {}, must_be_finite={"weight"})
        tensors["model"]["weight"].zero_()
        assert writer.result(wait=True) is not None
        checkpoint = store.list()[-1]
        assert sorted(path.name for path in checkpoint.path.glob("*.safetensors")) == [
            "model.safetensors",
            "plugins.safetensors",
        ]
        assert torch.equal(load_file(checkpoint.path / "model.safetensors")["weight"], torch.arange(float(size)))
    writer.close()


UNIT = 2**25


@pytest.mark.parametrize("setting", ["auto", True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("free", "has_room"), [(8, True), (2, False)])
def test_a_gpu_saves_in_the_background_if_its_host_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Any, device: str, free: int, has_room: bool
) -> None:
    """A state of two units. The limit is that of a container."""
    for name, text in {"max": f"{9 * UNIT}", "current": f"{(9 - free) * UNIT + 5}", "stat": "inactive_file 5"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    groups = [(tmp_path, "none", ("memory.max", "memory.current", "memory.stat"))]
    monkeypatch.setattr("gpt_simple.hardware._CONTROL_GROUPS", groups)
    model = torch.nn.Linear(2**12, 2**12, bias=False, device="meta")
    said: list[str] = []
    run = SimpleNamespace(
        device=torch.device(device),
        config=Config(training=TrainingConfig(background_save=setting)),
        dist=ProcessGroup(0, 1, torch.device("cpu")),
        raw=model,
        optimizer=torch.optim.SGD(model.parameters()),
        log=SimpleNamespace(info=lambda text, **fields: said.append(text)),
    )
    saves: Any = Checkpointer(run, None, None, None, None)  # type: ignore[arg-type]
    expected = setting is True or (setting == "auto" and device == "cuda" and has_room)
    assert [saves._has_background(), saves._has_background()] == [expected, expected]
    refused = setting == "auto" and device == "cuda" and not has_room
    assert len(said) == refused
    if refused:
        assert "a copy of the state takes 0.1 GiB, and 0.1 GiB of host memory are free" in said[0]
