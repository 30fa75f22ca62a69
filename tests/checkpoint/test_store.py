"""Publishing, reading, retention: what works when nothing goes wrong."""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

from gpt_simple._files import remove_tree
from gpt_simple.checkpoint.manifest import MANIFEST, Manifest
from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.errors import CheckpointError

from .conftest import assert_whole, hidden_names, publish, steps


def test_a_checkpoint_comes_back_as_it_was(store: Store) -> None:
    tensors = {
        "f32": torch.randn(3, 5),
        "bf16": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6).view(2, 3).t(),
        "flag": torch.tensor([True, False]),
    }
    document = {"nan": math.nan, "inf": -math.inf, "text": "Füße", "deep": [{"a": None}]}
    published = store.publish(12, tensors={"model": tensors}, documents={"state": document})
    (checkpoint,) = store.list()
    assert (checkpoint.step, checkpoint.path.name) == (12, "step-00000012")
    assert published.path == checkpoint.path
    assert published.bytes == sum(path.stat().st_size for path in checkpoint.path.iterdir())
    loaded = Store(store.root).load_tensors(checkpoint, "model")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    read = store.load_document(checkpoint, "state")
    assert math.isnan(read.pop("nan"))
    assert read == {"inf": -math.inf, "text": "Füße", "deep": [{"a": None}]}


def test_the_files_are_plain_safetensors_and_json(store: Store) -> None:
    path = publish(store, 3).path
    assert sorted(os.listdir(path)) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "plugins.json",
        "state.json",
    ]
    assert load_file(path / "model.safetensors")["head.bias"].tolist() == [3.0] * 8
    manifest = json.loads((path / "MANIFEST.json").read_text())
    layout = manifest["files"]["model.safetensors"]["tensors"]["head.weight"]
    assert layout == {"dtype": "float32", "shape": [8, 4]}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(store: Store, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = publish(store, 1).path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}


def test_tensors_that_share_memory_are_both_stored(store: Store) -> None:
    tensor = torch.arange(4.0)
    store.publish(1, tensors={"plugins": {"a": tensor, "b": tensor, "c": tensor[:2]}}, documents={})
    loaded = store.load_tensors(store.list()[0], "plugins")
    assert {name: value.tolist() for name, value in loaded.items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
        "c": [0, 1],
    }


def test_loaded_tensors_outlive_their_file(store: Store) -> None:
    path = publish(store, 1).path
    loaded = store.load_tensors(store.list()[0], "model")
    os.truncate(path / "model.safetensors", 0)
    assert loaded["head.bias"].tolist() == [1.0] * 8


def test_everything_is_on_the_disk_before_its_name_appears(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves cannot be tried; the order can."""
    synced: list[int] = []
    before: list[int] = []
    fsync, rename = os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def noting_rename(path: Path, target: Path) -> Path:
        before.extend(synced)
        synced.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    path = publish(store, 1).path
    assert {file.stat().st_ino for file in (path, *path.iterdir())} <= set(before)
    assert synced == [store.root.stat().st_ino], "the new name itself comes last"


def test_publishing_a_step_again_makes_it_the_newest(store: Store) -> None:
    for step in (1, 2, 3):
        publish(store, step)
    publish(store, 2, salt=10)
    assert steps(store) == [1, 3, 2]
    newest, skipped = store.newest_valid()
    assert newest is not None
    assert not skipped
    assert_whole(store, newest, values={12.0})
    assert hidden_names(store) == []


def test_a_run_that_went_back_continues_from_its_own_work(store: Store) -> None:
    """After a resume from step 500 the step 600 is newer than the abandoned 2000, and is not pruned for it."""
    for step in (500, 1000, 1500, 2000):
        publish(store, step)
    publish(store, 600)
    newest, _ = store.newest_valid()
    assert newest is not None
    assert newest.step == 600
    store.prune(keep_last_k=2)
    assert steps(store) == [2000, 600]


def test_a_document_that_is_not_json_is_refused_by_name(store: Store) -> None:
    with pytest.raises(CheckpointError, match=r"step 5.*Tensor is not JSON"):
        store.publish(5, tensors={}, documents={"state": {"x": torch.zeros(1)}})
    assert hidden_names(store) == []


def test_a_missing_part_is_named(store: Store) -> None:
    publish(store, 1)
    with pytest.raises(CheckpointError, match=r"step-00000001 has no ema\.safetensors"):
        store.load_tensors(store.list()[0], "ema")


def test_open_takes_a_checkpoint_anywhere_under_any_name(store: Store, tmp_path: Path) -> None:
    publish(store, 7).path.rename(tmp_path / "my-best")
    checkpoint = Checkpoint.open(tmp_path / "my-best")
    assert checkpoint.step == 7
    assert_whole(store, checkpoint)
    with pytest.raises(CheckpointError, match="there is no checkpoint directory"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no MANIFEST\.json"):
        Checkpoint.open(tmp_path)


def test_an_empty_place_has_no_checkpoints(store: Store) -> None:
    assert store.list() == []
    assert store.newest_valid() == (None, [])
    assert store.prune(1) == []


@pytest.mark.parametrize(
    ("k", "every", "protect", "kept"),
    [
        (None, None, (), [10, 20, 30, 40, 50, 60]),
        (3, None, (), [40, 50, 60]),
        (1, None, (), [50, 60]),
        (0, None, (), [50, 60]),
        (2, 30, (), [30, 50, 60]),
        (2, None, {10}, [10, 50, 60]),
        (99, None, (), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention(store: Store, k: int | None, every: int | None, protect: set[int], kept: list[int]) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        publish(store, step)
    deleted = store.prune(k, every, protect)
    assert steps(store) == kept
    assert sorted([c.step for c in deleted] + kept) == [10, 20, 30, 40, 50, 60]
    assert hidden_names(store) == []


def test_only_the_next_save_waits_for_removals(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        publish(store, step)
    slow = threading.Event()

    def slowly(path: Path) -> None:
        if path.exists():
            assert slow.wait(30)
        remove_tree(path)

    monkeypatch.setattr("gpt_simple.checkpoint.store.remove_tree", slowly)
    store.prune(2, wait=False)
    assert steps(store) == [3, 4]
    assert hidden_names(store) == [".step-00000001.deleted", ".step-00000002.deleted"]
    threading.Timer(0.05, slow.set).start()
    publish(store, 5)
    assert hidden_names(store) == []


def test_retention_does_not_count_damaged_checkpoints(store: Store) -> None:
    for step in (1, 2, 3, 4):
        publish(store, step)
    truncated, flipped = (store.root / f"step-0000000{n}" / "model.safetensors" for n in (4, 3))
    os.truncate(truncated, 10)
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    Store(store.root).prune(1)
    assert steps(store) == [1, 2, 3, 4]
    publish(store, 5)
    Store(store.root).prune(1)
    assert {2, 4, 5} <= set(steps(store)), "4 is damaged for all to see and left for a person"
    assert 1 not in steps(store)


def test_a_checkpoint_that_cannot_be_deleted_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        publish(store, step)
    rename = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if path.name == "step-00000001":
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stuck)
        assert [checkpoint.step for checkpoint in store.prune(2)] == [2]
    assert steps(store) == [1, 3, 4]
    assert [checkpoint.step for checkpoint in store.prune(2)] == [1]


def test_sweep_removes_only_leftovers_of_dead_processes(store: Store) -> None:
    publish(store, 1)
    living = store.root / f".step-00000002.tmp-{os.getppid()}"
    dead = store.root / ".step-00000002.tmp-999999999"
    own = store.root / f".step-00000002.tmp-{os.getpid()}"
    gone = store.root / ".step-00000000.deleted"
    foreign = store.root / ".notes"
    for path in (living, dead, own, gone, foreign):
        path.mkdir()
        (path / "file").touch()
    store.sweep()
    assert hidden_names(store) == sorted([living.name, foreign.name])


def test_a_checkpoint_between_two_renames_is_recovered(store: Store) -> None:
    path = publish(store, 1).path
    path.rename(store.root / ".step-00000001.replaced")
    fresh = Store(store.root)
    (checkpoint,) = fresh.list()
    assert_whole(fresh, checkpoint)
    fresh.sweep()
    assert [c.path for c in fresh.list()] == [path]


def test_deleting_what_is_gone_is_an_error_that_names_it(store: Store) -> None:
    publish(store, 1)
    (checkpoint,) = store.list()
    store.delete(checkpoint)
    with pytest.raises(CheckpointError, match="step-00000001 cannot be deleted: No such file"):
        store.delete(checkpoint)


@pytest.mark.parametrize("name", ["../outside.json", "/outside.json", "deeper/outside.json"])
def test_a_file_outside_a_checkpoint_is_not_opened(store: Store, name: str) -> None:
    """The digest of a manifest that somebody else made is right, too."""
    publish(store, 1)
    publish(store, 2)
    path = store.root / "step-00000002"
    manifest = Manifest.read(path)
    files = {name if file == "state.json" else file: entry for file, entry in manifest.files.items()}
    (path / MANIFEST).write_text(evolve(manifest, files=files).to_json())
    newest, ((_, reason),) = Store(store.root).newest_valid()
    assert newest is not None
    assert newest.step == 1
    assert f"{name} is not a file of the checkpoint" in reason
