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

import numpy as np
import pytest

from gpt_simple.config.schema import Config
from gpt_simple.data.cache import ROOT_VARIABLE, build_once, cache_root, locked
from gpt_simple.data.prepare import prepare
from gpt_simple.errors import DataError
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.preflight.data import inspect_data

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


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_value(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def deep_nesting(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def another_type(path: Path) -> None:
    path.write_bytes(b"[]")


def gone(path: Path) -> None:
    path.unlink()


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [nothing, half, another_value, deep_nesting, another_type, gone, a_directory]
DERIVED = [
    *("dataset.json", "tokenizer/tokenizer.json", "train/all/shard-00000.bin", "train/all/shard-00000.idx"),
    *("sha256", "spans.npy", "offsets.npy", "row_targets.npy", "verified-*.json"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_file_that_is_damaged_is_made_again(
    name: str,
    damage: Callable[[Path], None],
    tmp_path: Path,
    config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(tmp_path / "cache"))
    settings = config(source="stories", max_documents=30, val_fraction=0.2, packing="best_fit")

    def rows() -> list[list[list[int]]]:
        train = prepare(settings, builtin_registry()).train
        found = np.empty((2, train.rows, train.max_length), np.int64)
        train.read(np.arange(train.rows), *found, None)
        return found.tolist()

    expected = rows()
    damaged = next(path for path in sorted(tmp_path.glob(f"cache/**/{name}")) if "val-" not in str(path))
    damage(damaged)
    inspect_data(settings, builtin_registry())
    assert rows() == expected
    assert rows() == expected
    assert inspect_data(settings, builtin_registry()).unpacked is False


@pytest.mark.parametrize("place", [nothing, a_directory, gone])
def test_what_is_in_the_place_of_a_directory_is_replaced(place: Callable[[Path], None], tmp_path: Path) -> None:
    target, logged = tmp_path / "cache/it", list[str]()
    target.parent.mkdir()
    target.touch()
    place(target)

    def opened() -> str:
        if not (target / "file").is_file():
            raise DataError("damaged")
        return (target / "file").read_text()

    assert build_once(target, lambda path: (path / "file").touch(), logged.append, opened) == ""
    assert logged == ["damaged; it is made again"] * (place is not gone)


def test_a_link_in_the_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (tmp_path / "cache/it").symlink_to(tmp_path / "precious")

    def opened() -> None:
        if (tmp_path / "cache/it").is_symlink():
            raise DataError("damaged")

    build_once(tmp_path / "cache/it", lambda path: None, print, opened)
    assert (tmp_path / "precious/file").exists()


def test_a_home_that_cannot_be_found_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, "~no-such-user/cache")
    with pytest.raises(DataError, match="the cache of prepared data has no place"):
        cache_root()
