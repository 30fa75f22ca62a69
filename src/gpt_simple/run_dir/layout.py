"""Where each file of a run is, and how the small ones are written."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt_simple._files import holders_below, nearest_existing, new_directory, remove_if_empty, write_whole
from gpt_simple.errors import CheckpointError, ConfigError

_CHECKPOINT = re.compile(r"step-\d{8,}|\.step-\d{8,}\.(?:deleted|replaced|tmp-\d+)")
_CHECKPOINT_FILE = re.compile(r"(?:model|optimizer|plugins|state|run|MANIFEST).*\.(?:json|safetensors)|\.tmp\w+")
_TOKENIZER_FILE = re.compile(r"tokenizer\.json")


class RunDir:
    """The files of a run, under ``training.output_dir``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_json = root / "run.json"
        """What ran, and the lineage of resumes."""
        self.status_json = root / "status.json"
        """What the run is doing now, or how it ended."""
        self.summary_json = root / "summary.json"
        """The outcome of the last launch that ended by itself."""
        self.metrics_jsonl = root / "metrics.jsonl"
        """One object a line; see ``read_metrics``."""
        self.lock = root / ".lock"
        """Held by the process that owns the run."""
        self.stop_request = root / ".stop"
        """Left by ``gpt-simple stop`` where no signal reaches the owner."""
        self.tokenizer = root / "tokenizer"
        """Directory of the tokenizer that the run trains with."""
        self.checkpoints = root / "checkpoints"
        """Directory of the checkpoints."""

    def check(self) -> None:
        """Refuse a directory that cannot be used. Changes nothing.

        Raises ConfigError if it plainly cannot be created or written, and CheckpointError if a run would follow a
        symbolic link in it, or change a file that no run wrote.
        """
        nearest = nearest_existing(self.root)
        if not nearest.is_dir():
            raise _refusal(f"{nearest} is a file, not a directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise _refusal(f"{nearest} cannot be written")
        self._refuse_links()
        for path in (self.lock, self.stop_request, *self._documents(), self.tokenizer / "tokenizer.json"):
            if path.exists() and not path.is_file():
                raise _in_the_way(path, "is not a file")
        try:
            if self.metrics_jsonl.exists():
                self.metrics_jsonl.open("rb+").close()
        except OSError as error:
            raise _in_the_way(self.metrics_jsonl, f"cannot be read and written ({error.strerror})") from error
        for path in (self.tokenizer, self.checkpoints):
            if path.exists() and not path.is_dir():
                raise _in_the_way(path, "is not a directory")
        for path in self._files() if not self._has_begun() else ():
            if path.exists():
                raise _in_the_way(path, "is there already, and no run wrote it")

    def create(self) -> None:
        """Create the directory and check that it can be written; on ConfigError nothing is left behind."""
        try:
            with new_directory(self.root), tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise _refusal(f"{self.root} cannot be written ({error.strerror})") from error

    def is_used(self) -> bool:
        """Whether a run has left something here that would mix with a new one."""
        return any(path.exists() for path in self._documents()) or self.has_checkpoints()

    def has_checkpoints(self) -> bool:
        """Whether a run has saved a checkpoint here, or begun to."""
        return any(self._checkpoint_directories())

    def remove_run_files(self) -> None:
        """Remove what runs wrote here, nothing else: foreign files and quarantined checkpoints stay.

        A symbolic link is never followed: one in the way is a CheckpointError before anything is removed.
        """
        self._refuse_links()
        for directory in [*self._checkpoint_directories(), self.tokenizer]:
            pattern = _TOKENIZER_FILE if directory == self.tokenizer else _CHECKPOINT_FILE
            # The manifest first: what is left of a checkpoint is not one.
            for path in sorted(_children(directory), key=lambda path: path.name != "MANIFEST.json"):
                if pattern.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
                    path.unlink()
            remove_if_empty(directory)
        remove_if_empty(self.checkpoints)
        for path in self._documents():
            path.unlink(missing_ok=True)

    def _refuse_links(self) -> None:
        """A link may have come with a copied directory, and lead to anything."""
        for path in (self.tokenizer, self.checkpoints, *self._files()):
            if path.is_symlink():
                raise _in_the_way(path, "is a symbolic link, and a run follows none in its directory")

    def _has_begun(self) -> bool:
        """Whether a run has left a sign of itself here. An empty lock is one of a launch that ended early."""
        signs = (self.run_json, {"run_id"}), (self.status_json, {"state"}), (self.lock, {"host", "pid"})
        return (
            any(keys <= _keys(path) for path, keys in signs)
            or (self.lock.is_file() and not self.lock.stat().st_size)
            or any((path / "MANIFEST.json").exists() for path in self._checkpoint_directories())
        )

    def _files(self) -> Iterator[Path]:
        """All that a run may have here, but for the two directories themselves."""
        yield from (self.lock, self.stop_request, *self._documents(), *_children(self.tokenizer))
        yield from self._checkpoint_directories()

    def _documents(self) -> tuple[Path, ...]:
        return self.run_json, self.status_json, self.summary_json, self.metrics_jsonl

    def _checkpoint_directories(self) -> Iterator[Path]:
        return (path for path in _children(self.checkpoints) if _CHECKPOINT.fullmatch(path.name))


def no_run(root: Path) -> CheckpointError:
    """The error of a command that is about the run in a directory without one. It names the runs below."""
    hint = runs_below(root) or "expected a training.output_dir of a run"
    return CheckpointError(f"there is no run in {root}", hint=hint)


def runs_below(root: Path) -> str:
    """A hint with the runs in directories below one that holds none; empty without any."""
    return holders_below(root, "runs", "run.json", "status.json")


def _refusal(message: str) -> ConfigError:
    return ConfigError(message, key="training.output_dir", hint="choose another directory")


def _in_the_way(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} {problem}", hint="move it away, or choose another training.output_dir")


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace a JSON file in one step: readers see the old or the new one. NaN and infinities become null.

    ``durable`` also makes it survive a power cut, which costs a few milliseconds.
    """
    write_whole(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n", durable=durable)


def finite(value: Any) -> Any:
    """A JSON value in which NaN and infinities are null and paths are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _keys(path: Path) -> set[str]:
    """The keys of the object in a JSON file; empty if it holds anything else or cannot be read."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    return set(document) if isinstance(document, dict) else set()
