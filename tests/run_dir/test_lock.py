"""One owner: a second launch is refused and changes nothing, and a dead owner blocks none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import asdict, evolve

from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir import lock as lock_module
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import Owner, RunLock, owner_of

from .test_layout import snapshot


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def holder(run_dir: RunDir) -> Iterator[int]:
    """Another process that owns the directory."""
    child = in_child(lambda: RunLock(run_dir).acquire())
    yield child
    kill(child)


def in_child(work: Callable[[], object]) -> int:
    """A forked process that has done ``work`` and waits to be killed, but does not outlive a failed test by much."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            work()
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read(1) == b"x"
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def leave_behind(run_dir: RunDir, owner: Owner) -> None:
    """The lock file of an owner that died."""
    run_dir.lock.write_text(json.dumps(asdict(owner)))


def test_a_second_launch_is_refused_by_name_and_changes_nothing(run_dir: RunDir, holder: int) -> None:
    before = snapshot(run_dir.root)
    with pytest.raises(CheckpointError, match=rf"in use by process {holder} on .*, since \d{{4}}-") as refused:
        RunLock(run_dir).acquire()
    assert refused.value.exit_code == 4
    assert snapshot(run_dir.root) == before


def test_a_second_lock_in_the_same_process_is_refused(run_dir: RunDir) -> None:
    with RunLock(run_dir), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        RunLock(run_dir).acquire()


def test_one_that_was_deleted_is_lost_and_can_be_renewed(run_dir: RunDir) -> None:
    with RunLock(run_dir) as lock:
        assert lock.is_held()
        run_dir.lock.unlink()
        assert lock.is_lost()
        lock.renew()
        assert lock.is_held()
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
            RunLock(run_dir).acquire()
    assert owner_of(run_dir) == (None, "gone")


def test_one_that_another_took_is_not_renewed_and_not_emptied(run_dir: RunDir) -> None:
    with RunLock(run_dir) as lock:
        run_dir.lock.unlink()
        other = in_child(lambda: RunLock(run_dir).acquire())
        assert not lock.is_held()
        with pytest.raises(CheckpointError, match=f"process {other}"):
            lock.renew()
        lock.release()
        assert owner_of(run_dir)[1] == "holds"
    kill(other)


def test_a_full_disk_refuses_a_launch_with_a_sentence(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"\.lock cannot be written: No space left"):
            RunLock(run_dir).acquire()
    with RunLock(run_dir):
        pass


def test_a_killed_owner_does_not_block(run_dir: RunDir) -> None:
    kill(in_child(lambda: RunLock(run_dir).acquire()))
    with RunLock(run_dir):
        owner, liveness = owner_of(run_dir)
        assert owner is not None
        assert (owner.pid, liveness) == (os.getpid(), "holds")


def test_a_shorter_owner_leaves_nothing_of_the_one_before(run_dir: RunDir) -> None:
    leave_behind(run_dir, evolve(Owner.this_process(), pid=999_999_999, command="a much longer one " * 50))
    with RunLock(run_dir):
        owner, liveness = owner_of(run_dir)
        assert owner is not None
        assert (owner.pid, liveness) == (os.getpid(), "holds")


def test_a_killed_owner_that_is_a_zombie_does_not_block(run_dir: RunDir) -> None:
    """As in a container without an init process: its number stays."""
    child = in_child(lambda: RunLock(run_dir).acquire())
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with RunLock(run_dir):
        pass
    os.waitpid(child, 0)


def test_release_frees_and_may_be_repeated(run_dir: RunDir) -> None:
    lock = RunLock(run_dir)
    lock.acquire()
    lock.release()
    lock.release()
    assert owner_of(run_dir) == (None, "gone")
    kill(in_child(lambda: RunLock(run_dir).acquire()))


def test_the_lock_is_released_when_the_run_raises(run_dir: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(run_dir):
        raise ZeroDivisionError
    assert owner_of(run_dir) == (None, "gone")


ME = Owner.this_process()


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(evolve(ME, ticks=ME.ticks + 1), id="its number was given to another process"),
        pytest.param(evolve(ME, boot="earlier"), id="the machine was started again"),
        pytest.param(evolve(ME, pid=999_999_999), id="dead"),
        pytest.param(evolve(ME, pid=1, host="pod-b", ticks=1), id="another container on this machine, dead"),
        pytest.param(evolve(ME, boot="", ticks=0), id="a system without boot ids"),
    ],
)
def test_stale_owners_are_recognised(run_dir: RunDir, owner: Owner) -> None:
    leave_behind(run_dir, owner)
    assert owner_of(run_dir) == (owner, "gone")
    with RunLock(run_dir):
        pass


def test_an_owner_elsewhere_that_touches_its_lock_is_respected(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "SILENCE_SECONDS", 30.0)
    leave_behind(run_dir, evolve(ME, host="node17", boot="its own"))
    assert owner_of(run_dir)[1] == "unknown"
    content = run_dir.lock.read_bytes()
    threading.Timer(0.2, lambda: os.utime(run_dir.lock, (0, 0))).start()
    logged: list[str] = []
    with pytest.raises(CheckpointError, match=r"in use by .* on node17"):
        RunLock(run_dir, logged.append).acquire()
    assert "waiting 30 s for a sign of life" in logged[0]
    assert run_dir.lock.read_bytes() == content


def test_a_moved_job_goes_on_when_the_other_machine_is_silent(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "SILENCE_SECONDS", 0.2)
    leave_behind(run_dir, evolve(ME, host="node17", boot="its own"))
    with RunLock(run_dir):
        assert owner_of(run_dir)[1] == "holds"


def test_an_owner_touches_its_lock_until_it_releases_it(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    with RunLock(run_dir):
        os.utime(run_dir.lock, (0, 0))
        wait_for(lambda: run_dir.lock.stat().st_mtime > 0)
    beating = [thread for thread in threading.enumerate() if thread.name == "lock-beat"]
    for thread in beating:
        thread.join(5)
    assert not any(thread.is_alive() for thread in beating)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "\0\0\0\0"])
def test_a_torn_lock_file_has_no_owner(run_dir: RunDir, content: str) -> None:
    run_dir.lock.write_text(content)
    with RunLock(run_dir):
        pass


def test_without_flock_the_process_itself_is_checked(
    run_dir: RunDir, holder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=f"process {holder}"):
        RunLock(run_dir).acquire()
    owner, liveness = owner_of(run_dir)
    assert owner is not None
    assert (owner.pid, liveness) == (holder, "unknown")
    dead = evolve(ME, pid=999_999_999)
    leave_behind(run_dir, dead)
    assert owner_of(run_dir) == (dead, "gone")
    with RunLock(run_dir):
        pass


def test_a_launch_waits_for_a_status_query(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query holds the lock for a moment."""
    monkeypatch.setattr(lock_module, "_PATIENCE", 30.0)
    run_dir.lock.touch()

    def ask_slowly() -> None:
        descriptor = os.open(run_dir.lock, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        threading.Timer(0.1, os.close, [descriptor]).start()

    asker = in_child(ask_slowly)
    with RunLock(run_dir):
        pass
    kill(asker)


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone/\.lock cannot be opened: No such file"):
        RunLock(RunDir(tmp_path / "gone")).acquire()


def test_release_ends_the_thread_and_allows_another_acquire(tmp_path: Path) -> None:
    lock = RunLock(RunDir(tmp_path))
    for _ in range(2):
        lock.acquire()
        assert "lock-beat" in {thread.name for thread in threading.enumerate()}
        lock.release()
        assert "lock-beat" not in {thread.name for thread in threading.enumerate()}


def test_the_lock_holds_no_secret_of_the_command(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["gpt-simple", "run", "--plugins.hook.password=sekret9", "--plugins.hook.token", "4"]
    )
    with RunLock(run_dir):
        owner, _ = owner_of(run_dir)
        assert "sekret9" not in run_dir.lock.read_text()
    assert owner is not None
    assert owner.command == "gpt-simple run --plugins.hook.password=(redacted) --plugins.hook.token (redacted)"
