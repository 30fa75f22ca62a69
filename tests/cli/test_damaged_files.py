"""Whatever is done to the files of a run, of the cache and of ``tokenize``: a documented exit code and no traceback."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt_simple._documents import check, fits, parse
from gpt_simple.checkpoint.manifest import Manifest, sha256_of
from tests.conftest import Shell

CHECKPOINT = "out/checkpoints/step-00000004"
DOCUMENTS = ("run.json", "status.json", "summary.json", "metrics.jsonl", ".lock", ".stop", "tokenizer/tokenizer.json")
OF_RUN = [f"out/{name}" for name in DOCUMENTS]
OF_RUN += [f"{CHECKPOINT}/{name}" for name in ("MANIFEST.json", "state.json", "plugins.json", "model.safetensors")]
OF_DATA = ["data/dataset.json", "data/tokenize.json", "data/tokenizer/tokenizer.json", "data/train/all/shard-00000.bin"]

MORE = "--training.max_steps=5"
ON_RUN = [("status", "out"), ("report", "out"), ("sample", "out", "--tokens=2")]
ON_RUN += [("stop", "out"), ("validate", "config.toml", MORE), ("run", "config.toml", MORE)]
WITH_DATA = (
    "config.toml",
    "--data.source=null",
    "--data.path=data",
    "--training.output_dir=other",
    "--training.max_steps=1",
)
TOKENIZE = ("tokenize", "--input_dir=raw", "--output_dir=data", "--tokenizer=bytes", "--num_workers=1")
ON_DATA = [("data", "inspect", "data"), TOKENIZE, ("validate", *WITH_DATA), ("run", *WITH_DATA)]


def _directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _unreadable(path: Path) -> None:
    path.touch()
    path.chmod(0)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "list": lambda path: path.write_bytes(b"[]"),
    "deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "directory": _directory,
    "unreadable": _unreadable,
}


@contextmanager
def permissions_hold() -> Iterator[None]:
    """Within, permissions hold for this thread, also if it is root's: two capabilities are not in effect."""
    if os.geteuid():
        yield
        return
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective, sets[0] = sets[0], sets[0] & ~0b110
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for a finished run and a data set, which tests copy."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def damaged(whole: Path, here: Path, shell: Shell) -> Path:
    """A copy of the run and the data set in the working directory."""
    if not (whole / "out").exists():
        (here / "raw").mkdir()
        (here / "raw/a.txt").write_text("once upon a time there was a small house. " * 40)
        (here / "raw/b.txt").write_text("and it stood there until the end of the story. " * 40)
        assert shell("run", "config.toml").code == 0
        assert shell(*TOKENIZE).code == 0
        shutil.copytree(here, whole, dirs_exist_ok=True)
    else:
        shutil.copytree(whole, here, dirs_exist_ok=True)
    return here


def _try(shell: Shell, here: Path, file: str, damage: str, *command: str) -> None:
    before = here.parent / "before"
    shutil.copytree(here, before)
    DAMAGES[damage](here / file)
    with permissions_hold():
        ended = shell(*command)
    assert ended.code in (0, 2, 3, 4), (command, ended.err)
    assert "Traceback" not in ended.out + ended.err
    assert "RecursionError" not in ended.out + ended.err
    for each in here.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    shutil.copytree(before, here, dirs_exist_ok=True)
    shutil.rmtree(before)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", OF_RUN)
def test_damage_in_a_run_is_no_traceback(shell: Shell, damaged: Path, file: str, damage: str) -> None:
    for command in ON_RUN:
        _try(shell, damaged, file, damage, *command)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", OF_DATA)
def test_damage_in_data_is_no_traceback(shell: Shell, damaged: Path, file: str, damage: str) -> None:
    for command in ON_DATA:
        _try(shell, damaged, file, damage, *command)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["dataset.json", "tokenizer/tokenizer.json", "train/all/shard-00000.idx"])
def test_damage_in_the_cache_is_no_traceback(
    shell: Shell, damaged: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: str
) -> None:
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(damaged / "cache"))
    (damaged / "raw/a.txt").write_text("once upon a time. " * 100)
    options = ("config.toml", "--data.source=null", "--data.path=raw", "--training.output_dir=other", MORE)
    options = (*options, "--data.val_fraction=0.5")
    assert shell("run", *options).code == 0
    (directory,) = (damaged / "cache/datasets").glob("[!.]*")
    for command in ("validate", "run"):
        _try(shell, damaged, str((directory / file).relative_to(damaged)), damage, command, *options)


def _values(path: Path, key: str, value: object) -> None:
    document = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
    inner = document
    *outer, last = key.split(".")
    for name in outer:
        inner = inner[int(name) if name.isdecimal() else name]
    inner[int(last) if last.isdecimal() else last] = value
    path.write_text(json.dumps(document) + "\n")


WRONG = [
    ("status.json", "step", "x"),
    ("status.json", "state", []),
    ("status.json", "eta_seconds", 1e308),
    ("status.json", "time", -1e308),
    ("status.json", "pid", 10**30),
    ("run.json", "lineage.0", "x"),
    ("run.json", "lineage.0.time", 1e308),
    ("run.json", "facts.config", []),
    ("run.json", "facts.origins", 3),
    ("run.json", "facts.plugins", []),
    ("run.json", "facts.run.floor", "low"),
    ("run.json", "val_losses", {"x": []}),
    ("summary.json", "final_loss", []),
    ("summary.json", "plugin_seconds", []),
    ("metrics.jsonl", "step", None),
    ("metrics.jsonl", "time", "noon"),
]


@pytest.mark.parametrize(("file", "key", "value"), WRONG, ids=lambda part: str(part)[:20])
def test_wrong_values_in_a_run_are_no_traceback(
    shell: Shell, damaged: Path, file: str, key: str, value: object
) -> None:
    _values(damaged / "out" / file, key, value)
    for command in (*ON_RUN, ("run", "config.toml")):
        ended = shell(*command)
        assert ended.code in (0, 2, 3, 4), (command, ended.err)
        assert "Traceback" not in ended.out + ended.err


def _tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors in a file, and the manifest's list of them."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = Manifest.read(path.parent)
    layouts = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in tensors.items()}
    files = {**manifest.files, path.name: attrs.evolve(manifest.files[path.name], tensors=layouts)}
    (path.parent / "MANIFEST.json").write_text(attrs.evolve(manifest, files=files).to_json())


CRAFTED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "state is a list": ("state.json", lambda path: path.write_text("[]")),
    "state is deep": ("state.json", lambda path: path.write_text("[" * 100_000)),
    "another step": ("state.json", lambda path: _values(path, "step", 3)),
    "tokens are text": ("state.json", lambda path: _values(path, "tokens", "many")),
    "no parameters": ("state.json", lambda path: _values(path, "optimizer.parameters", {})),
    "configuration is a list": ("state.json", lambda path: _values(path, "run.config", [])),
    "plugins are a list": ("plugins.json", lambda path: path.write_text("[]")),
    "a tensor is missing": ("plugins.json", lambda path: _values(path, "checkpoint.state", {"a": {"$tensor": "b"}})),
    "a weight is missing": ("model.safetensors", lambda path: _tensors(path, lambda tensors: tensors.popitem())),
    "all weights are missing": ("model.safetensors", lambda path: _tensors(path, lambda tensors: tensors.clear())),
    "a weight is too many": (
        "model.safetensors",
        lambda path: _tensors(path, lambda tensors: tensors.update(more=np.zeros(3, np.float32))),
    ),
    "a weight is of another type": (
        "model.safetensors",
        lambda path: _tensors(path, lambda tensors: tensors.update({min(tensors): np.zeros(3, np.float64)})),
    ),
    "a moment is missing": ("optimizer.safetensors", lambda path: _tensors(path, lambda tensors: tensors.popitem())),
    "weights are text": ("model.safetensors", lambda path: path.write_text("no tensors")),
    "weights are others": (
        "model.safetensors",
        lambda path: path.write_bytes((path.parent / "optimizer.safetensors").read_bytes()),
    ),
}


@pytest.mark.parametrize("craft", CRAFTED)
def test_a_crafted_checkpoint_falls_back(shell: Shell, damaged: Path, craft: str) -> None:
    step = damaged / CHECKPOINT
    name, change = CRAFTED[craft]
    change(step / name)
    manifest = Manifest.read(step)
    files = {
        each: attrs.evolve(entry, size=(step / each).stat().st_size, sha256=sha256_of(step / each))
        for each, entry in manifest.files.items()
    }
    (step / "MANIFEST.json").write_text(attrs.evolve(manifest, files=files).to_json())
    assert shell("sample", "out", "--tokens=2").code == 0
    ended = shell("run", "config.toml", MORE)
    assert ended.code == 0, ended.err
    assert "resumed from step 2" in ended.out
    assert (damaged / f"{CHECKPOINT}.damaged/reason.txt").exists()


def test_a_leftover_of_no_possible_process_is_removed(shell: Shell, damaged: Path) -> None:
    leftover = damaged / "out/checkpoints/.step-00000001.tmp-99999999999999999999"
    leftover.mkdir()
    assert shell("run", "config.toml", MORE).code == 0
    assert not leftover.exists()


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[" * 500 + "]" * 500, "9" * 5000, b"\xff"])
def test_what_is_no_document_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(text)


def test_a_misfit_names_its_key() -> None:
    shape = {"a": [{"b": range(5)}], "c?": (None, str), "d?": {...: float}}
    assert fits({"a": [{"b": 4}], "more": 1, "d": {"x": 1}}, shape)
    for value, message in (
        ({"a": [{"b": 1}, {"b": 5}]}, r"a\[1\]\.b: expected a number from 0 to below 5"),
        ({"a": [{}]}, r"a\[0\]\.b: expected a number"),
        ({"a": [], "c": 1}, "c: expected null or text"),
        ({"a": [], "d": {"x": True}}, r"d\.x: expected a number"),
        ({}, "a: expected a list"),
        ([], "it: expected an object"),
    ):
        with pytest.raises(ValueError, match=message):
            check(value, shape)
