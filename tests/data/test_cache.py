"""The lock of the cache: one process works, the others wait, and a lock dies with its process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt_simple.data.cache import ROOT_VARIABLE, build_once, cache_root, locked
from gpt_simple.errors import DataError

HOLDER = """
import sys, time
from pathlib import Path
from gpt_simple.data.cache import locked
with locked(Path(sys.argv[1]), "it", print):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_process_holds(directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def kill(holder: subprocess.Popen[str], directory: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)


def finish(holder: subprocess.Popen[str], directory: Path) -> None:
    shutil.rmtree(directory)
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()


@pytest.mark.parametrize("end", [kill, finish])
def test_a_process_logs_that_it_waits_for_the_lock(
    end: Callable[[subprocess.Popen[str], Path], None], tmp_path: Path
) -> None:
    logged: list[str] = []
    with another_process_holds(tmp_path / "cache") as holder:

        def log(message: str) -> None:
            logged.append(message)
            threading.Timer(0.3, end, (holder, tmp_path / "cache")).start()

        with locked(tmp_path / "cache", "it", log):
            assert (tmp_path / "cache").is_dir()
    assert logged == [f"waiting for another process that prepares {tmp_path / 'cache/it'}"]


def test_a_lock_that_is_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / ".it.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match="cannot be written"), locked(tmp_path, "it", print):
        pass
    assert (tmp_path / "precious").read_text() == "text"


def test_a_directory_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "cache/it"

    def build(part: str) -> None:
        def fill(directory: Path) -> None:
            (directory / "first").write_text("text")
            (directory / part).write_text("text")
            assert not target.exists()

        build_once(target, fill, print)

    with pytest.raises(DataError, match="cannot be written"):
        build("no/such/directory")
    assert [path.name for path in target.parent.iterdir()] == [".it.lock"]
    build("second")
    build("third")
    assert sorted(path.name for path in target.iterdir()) == ["first", "second"]


def test_a_home_that_cannot_be_found_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, "~no-such-user/cache")
    with pytest.raises(DataError, match="the cache of prepared data has no place"):
        cache_root()
