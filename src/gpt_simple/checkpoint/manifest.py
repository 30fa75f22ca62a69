"""MANIFEST.json: what makes a directory a checkpoint, and how damage is recognised.

The manifest is written last and names every other file with its size and SHA-256, so a checkpoint is whole
exactly when its manifest says so. It carries a digest of itself: a flipped bit in it is found like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from attrs import asdict, frozen

from gpt_simple._documents import COUNT, check, parse
from gpt_simple.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 1
"""Raised when a reader of the old format would misread the new one."""
_FILE = {"size": COUNT, "sha256": str, "tensors": (None, {...: {"dtype": str, "shape": [COUNT]}})}
_SHAPE = {"format": int, "step": COUNT, "sequence": COUNT, "files": {...: _FILE}}


class NewerFormat(CheckpointError):
    """The checkpoint is sound, but a newer gpt-simple wrote it."""


class Unreadable(CheckpointError):
    """A file of the checkpoint may be sound, but permissions or the device prevent reading it now."""


@frozen
class FileEntry:
    """One file of a checkpoint: its size in bytes, its SHA-256, and the tensors in it if it holds any.

    ``tensors`` has the ``dtype`` and ``shape`` of each, so that people can read a checkpoint's content.
    """

    size: int
    sha256: str
    tensors: Mapping[str, Any] | None = None


@frozen
class Manifest:
    """The content of MANIFEST.json.

    ``sequence`` numbers the checkpoints of a directory in the order of publishing. Steps do not give that order,
    because a run may go back and continue from an earlier one; clocks do not, because they jump.
    """

    step: int
    sequence: int
    files: Mapping[str, FileEntry]

    def to_json(self) -> str:
        """The text of the file, with its own digest. It ends without a newline: losing one would go unnoticed."""
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({**body, "sha256": _digest(body)}, indent=1)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Parse and check the manifest of a directory; CheckpointError says what is wrong with it."""
        path = directory / MANIFEST
        try:
            with _explained(path):
                body = parse(path.read_bytes())
        except ValueError:
            raise _damaged(path, "it is not JSON") from None
        if not isinstance(body, dict) or not isinstance(body.get("format"), int):
            raise _damaged(path, "it has no format number")
        if body["format"] > FORMAT:
            raise NewerFormat(
                f"{path} has format {body['format']} and this gpt-simple reads up to {FORMAT}: "
                "a newer version wrote it; upgrade to resume from it"
            )
        if body.pop("sha256", None) != _digest(body):
            raise _damaged(path, "its own digest differs")
        try:
            check(body, _SHAPE)
        except ValueError as error:
            raise _damaged(path, str(error)) from None
        if outside := [name for name in body["files"] if Path(name).name != name]:
            raise _damaged(path, f"{outside[0]} is not a file of the checkpoint")
        files = {name: FileEntry(file["size"], file["sha256"], file["tensors"]) for name, file in body["files"].items()}
        return cls(body["step"], body["sequence"], files)


def check_file(path: Path, entry: FileEntry, *, full: bool) -> None:
    """Compare a file's size, and with ``full`` its SHA-256, with an entry's, or raise CheckpointError.

    Without ``full`` the file is only opened. Raises Unreadable where the system refuses the file.
    """
    with _explained(path):
        size = path.stat().st_size
        if size != entry.size:
            raise _damaged(path, f"it has {size:,} bytes and the manifest says {entry.size:,}")
        if not full:
            path.open("rb").close()
        elif sha256_of(path) != entry.sha256:
            raise _damaged(path, "its SHA-256 is not the manifest's (flipped bits, or a file of another checkpoint)")


def check_tensors(path: Path, layouts: Mapping[str, Any]) -> None:
    """Compare the names and shapes in a safetensors file with those of its entry, or raise CheckpointError."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _damaged(path, f"it is no safetensors file ({error})") from None
    if found != {name: layout["shape"] for name, layout in layouts.items()}:
        raise _damaged(path, "its tensors are not those that the manifest lists")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise errors of the system as CheckpointError: damage, or Unreadable where it refuses ``path``."""
    try:
        yield
    except FileNotFoundError:
        if path.name == MANIFEST:
            raise CheckpointError(f"{path.parent} is not a whole checkpoint: it has no {MANIFEST}") from None
        raise _damaged(path, "the file is missing") from None
    except (NotADirectoryError, IsADirectoryError) as error:
        raise _damaged(path, str(error.strerror)) from None
    except OSError as error:
        raise Unreadable(
            f"{path} cannot be read: {error.strerror}. That is no damage, and nothing was renamed: make the file"
            " readable, or move its directory away to go on from the checkpoint before it"
        ) from error


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {how}")
