"""Kills, failing operations, damage: nothing valid is lost, nothing invalid is loaded, and a message says so."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gpt_simple.checkpoint.manifest import Unreadable
from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.errors import CheckpointError

from .conftest import assert_whole, hidden_names, publish, steps
from .injection import FINISHED, KILLED, at_operation, outcome, refuse, start

UNTOUCHED = 9
"""Exit code of a child that ended before its fault was due."""

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "plugins.json", "MANIFEST.json")


@pytest.mark.parametrize("kills", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing_that_was_published(store: Store, kills: int) -> None:
    """Each child goes on where the last one was killed: publishes, replaces, prunes, and reports what is durable."""
    rng = random.Random(kills)
    window = 0.02
    durable = killed = 0
    for _ in range(kills):
        reader, writer = os.pipe()

        def work(first: int = durable + 1, writer: int = writer) -> None:
            mine = Store(store.root)
            os.write(writer, (first - 1).to_bytes(8, "little"))
            for step in range(first, first + 1000):
                publish(mine, step)
                os.write(writer, step.to_bytes(8, "little"))
                if step % 3 == 0:
                    publish(mine, step)
                mine.prune(2, keep_milestone_every=50)

        child = start(work)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read(8)
            time.sleep(rng.uniform(0.0, window))
            os.kill(child, signal.SIGKILL)
            killed += outcome(child) == KILLED
            if acknowledged := pipe.read():
                durable = int.from_bytes(acknowledged[-8:], "little")
            window *= 0.8 if acknowledged else 1.25  # half of them die in their first save, on any machine
        checker = Store(store.root)
        newest, skipped = checker.newest_valid()
        assert not skipped
        if durable:
            assert newest is not None
            assert newest.step in (durable, durable + 1)
        for checkpoint in checker.list():
            assert_whole(checker, checkpoint)
    assert killed == kills
    assert durable > kills / 10, "the children were killed before they could do anything"
    store.prune(2)
    assert hidden_names(store) == []


def _publish_and_prune(store: Store) -> None:
    publish(store, 4)
    store.prune(2)


def _replace(store: Store) -> None:
    publish(store, 3, salt=100)


@pytest.mark.parametrize("work", [_publish_and_prune, _replace])
@pytest.mark.parametrize("fault", ["kill", "fail"])
def test_a_fault_at_every_single_file_operation(tmp_path: Path, work: Callable[[Store], None], fault: str) -> None:
    """The two newest checkpoints outlive it whole, and the same work done again leaves no trace of it."""
    original = Store(tmp_path / "original")
    for step in (1, 2, 3):
        publish(original, step)
    for number in range(1000):
        store = Store(tmp_path / str(number))
        shutil.copytree(original.root, store.root)
        store.prune(None)  # imports and caches are warm before operations are counted

        def faulty(store: Store = store, number: int = number) -> None:
            happened = at_operation(number, fault, errno.ENOSPC)
            with contextlib.suppress(CheckpointError):
                work(store)
            os._exit(FINISHED if happened() else UNTOUCHED)

        ended = outcome(start(faulty))
        checker = Store(store.root)
        newest, skipped = checker.newest_valid()
        assert newest is not None
        assert not skipped
        assert newest.step in (3, 4)
        assert {2, 3} <= set(steps(checker)) or {3, 4} <= set(steps(checker))
        for checkpoint in checker.list():
            assert_whole(checker, checkpoint, values={float(checkpoint.step), 103.0})
        work(checker)
        checker.prune(2)
        assert hidden_names(checker) == []
        shutil.rmtree(store.root)
        assert ended in ((KILLED, UNTOUCHED) if fault == "kill" else (FINISHED, UNTOUCHED))
        if ended == UNTOUCHED:
            break
    assert 20 < number < 999


def damaged(store: Store, name: str, how: Callable[[bytes], bytes]) -> str:
    """Damage a file of the newest checkpoint; return why it was skipped in favour of the one before."""
    path = store.root / "step-00000002" / name
    content = path.read_bytes()
    path.write_bytes(how(content))
    fresh = Store(store.root)
    newest, skipped = fresh.newest_valid()
    path.write_bytes(content)
    assert newest is not None
    assert newest.step == 1
    ((place, reason),) = skipped
    assert place.name == "step-00000002"
    return reason


@pytest.fixture
def pair(store: Store) -> Store:
    publish(store, 1)
    publish(store, 2)
    return store


@pytest.mark.parametrize("name", FILES)
def test_truncation_is_found_and_named(pair: Store, name: str) -> None:
    for cut in (lambda size: 0, lambda size: 1, lambda size: size // 2, lambda size: size - 1):
        reason = damaged(pair, name, lambda content, cut=cut: content[: cut(len(content))])
        assert f"step-00000002/{name}" in reason


def test_any_flipped_bit_is_found_and_named(pair: Store) -> None:
    rng = random.Random(0)
    for _ in range(300):
        name = rng.choice(FILES)

        def flip(content: bytes) -> bytes:
            flipped = bytearray(content)
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            return bytes(flipped)

        assert f"step-00000002/{name}" in damaged(pair, name, flip)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_files_swapped_between_checkpoints_are_found(pair: Store, name: str) -> None:
    """Both have the same size, and each is a good file of its own."""
    one, two = (pair.root / f"step-0000000{n}" / name for n in (1, 2))
    content = one.read_bytes(), two.read_bytes()
    two.write_bytes(content[0])
    one.write_bytes(content[1])
    newest, skipped = Store(pair.root).newest_valid()
    assert newest is None
    assert all(name in reason for _, reason in skipped)
    assert len(skipped) == 2


def test_a_checkpoint_under_the_name_of_another_step_is_found(pair: Store) -> None:
    (pair.root / "step-00000002").rename(pair.root / "step-00000009")
    newest, skipped = Store(pair.root).newest_valid()
    assert newest is not None
    assert newest.step == 1
    assert "is of step 2, not 9" in skipped[0][1]
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        pair.verify(Checkpoint.open(pair.root / "step-00000009"))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(pair: Store, name: str) -> None:
    (pair.root / "step-00000002" / name).unlink()
    newest, ((_, reason),) = Store(pair.root).newest_valid()
    assert newest is not None
    assert newest.step == 1
    assert name in reason


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_now_is_not_passed_over(
    pair: Store, name: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pair.root / "step-00000002" / name
    refuse(path, code, monkeypatch)
    with pytest.raises(Unreadable, match=rf"step-00000002/{name} cannot be read: {os.strerror(code)}"):
        Store(pair.root).newest_valid()


def test_a_file_whose_device_fails_is_not_passed_over(pair: Store) -> None:
    path = pair.root / "step-00000002" / "MANIFEST.json"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # its first page cannot be read by anybody
    with pytest.raises(Unreadable, match=r"MANIFEST\.json cannot be read: Input/output error"):
        Store(pair.root).newest_valid()


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_the_place_of_a_file_is_damage(pair: Store, name: str) -> None:
    path = pair.root / "step-00000002" / name
    path.unlink()
    path.mkdir()
    newest, ((_, reason),) = Store(pair.root).newest_valid()
    assert newest is not None
    assert newest.step == 1
    assert f"{name} is damaged" in reason


def test_a_manifest_from_the_future_is_named_and_left_alone(pair: Store) -> None:
    path = pair.root / "step-00000002" / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2, "files": "of another shape"}))
    store = Store(pair.root)
    newest, ((place, reason),) = store.newest_valid()
    assert newest is not None
    assert newest.step == 1
    assert "format 2" in reason
    assert "upgrade" in reason
    assert store.quarantine(place, reason) == place
    publish(store, 3)
    store.prune(1)
    assert place.exists()
    document = (place / "MANIFEST.json").read_text()
    publish(store, 2)
    assert store.newest_valid()[0] == store.list()[-1]
    assert (place.with_name("step-00000002.newer") / "MANIFEST.json").read_text() == document


def test_nothing_is_loaded_that_was_not_verified(pair: Store) -> None:
    checkpoint = pair.list()[-1]
    path = checkpoint.path / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    fresh = Store(pair.root)
    for load in (fresh.load_tensors, fresh.load_document):
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged: its SHA-256"):
            load(checkpoint, "state")


def test_a_plain_file_in_place_of_a_checkpoint_is_quarantined(store: Store) -> None:
    publish(store, 1)
    file = store.root / "step-00000002"
    file.write_text("notes")
    found, skipped = store.newest_valid()
    assert found is not None
    assert [path for path, _ in skipped] == [file]
    assert store.quarantine(file, skipped[0][1]).read_text() == "notes"


def test_quarantine_keeps_every_byte_and_frees_the_name(pair: Store) -> None:
    for n in range(3):
        (pair.root / "step-00000002" / "model.safetensors").write_bytes(b"junk %d" % n)
        _, ((place, reason),) = pair.newest_valid()
        moved = pair.quarantine(place, reason)
        assert (moved / "model.safetensors").read_bytes() == b"junk %d" % n
        assert reason in (moved / "reason.txt").read_text()
        assert steps(pair) == [1]
        publish(pair, 2)
    names = {path.name for path in pair.root.iterdir()}
    assert {"step-00000002.damaged", "step-00000002.damaged-2", "step-00000002.damaged-3"} < names


def test_a_directory_deleted_under_the_run_is_made_again(pair: Store) -> None:
    shutil.rmtree(pair.root)
    publish(pair, 3)
    pair.prune(2)
    assert steps(pair) == [3]


def test_a_file_in_place_of_the_root_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a directory")
    store = Store(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: Not a directory"):
        publish(store, 1)
    assert (tmp_path / "checkpoints").read_text() == "not a directory"


def _big(store: Store, step: int) -> None:
    store.publish(step, tensors={"model": {"weight": torch.full((2**19,), float(step))}}, documents={})


def test_a_file_size_limit(store: Store) -> None:
    publish(store, 1)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        with pytest.raises(CheckpointError, match=r"step 2 was.*File too large; it needs 2\.0 MiB: .*ulimit"):
            _big(store, 2)
        publish(store, 3)

    assert outcome(start(work)) == FINISHED
    assert steps(store) == [1, 3]
    assert hidden_names(store) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=3m")


def mounted(disk: Path, options: str) -> Iterator[Path]:
    """A file system in memory, in a new directory."""
    disk.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=False)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)  # this process may map files there


def test_a_full_disk(small_disk: Path) -> None:
    """Two of 2 MiB do not fit on 3 MiB: the message has both numbers, the first one stays, and a retry succeeds."""
    store = Store(small_disk / "checkpoints")
    _big(store, 1)
    message = r"step 2 was not written.*No space left on device; it needs 2\.0 MiB and 1\.0 MiB are free"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=message):
            _big(store, 2)
        assert hidden_names(store) == []
        assert_only(store, 1)
    store.delete(store.list()[0])
    _big(store, 2)
    assert_only(store, 2)


def assert_only(store: Store, step: int) -> None:
    newest, skipped = store.newest_valid()
    assert newest is not None
    assert (newest.step, list(skipped), steps(store)) == (step, [], [step])
