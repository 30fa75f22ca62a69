"""The checkpoints of a run: published whole or not at all, verified before they are read, pruned with care.

A checkpoint is a directory ``step-00001000`` with a manifest. Hidden directories beside it are in the making
(``.step-00001000.tmp-PID``), just replaced, or being deleted; only a replaced one counts, and only until its
successor is there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
from attrs import define, evolve, field, frozen

from gpt_simple._documents import parse
from gpt_simple._files import AtomicDirectory, fsync, nearest_existing, remove_tree, write_whole
from gpt_simple.checkpoint.draft import Draft, Published, hidden
from gpt_simple.checkpoint.manifest import MANIFEST, Manifest, NewerFormat, Unreadable, check_file, check_tensors
from gpt_simple.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN_SEQUENCE = sys.maxsize
"""Puts a checkpoint whose manifest cannot be read last in order, so that it is verified and reported first."""

_DRAFTS: set[Path] = set()
"""The directories that this process is writing. Any other with its pid is of a dead process that had the same pid."""

_NAME = re.compile(r"(?P<hidden>\.)?step-(?P<step>\d{8,})(?(hidden)\.(?P<role>deleted|replaced|tmp-(?P<pid>\d+)))")

_WEIGHTS = re.compile(r"weights-(?P<name>.+)\.safetensors")


def weights_stem(name: str) -> str:
    """The stem of the file with a set of weights."""
    return f"weights-{name}"


@frozen
class Checkpoint:
    """A directory with a manifest. ``sequence`` orders the checkpoints of a run by the time of publishing."""

    step: int
    path: Path
    sequence: int = UNKNOWN_SEQUENCE

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """The checkpoint in any directory, such as one given by the user; CheckpointError if it is none."""
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint directory {path}")
        manifest = Manifest.read(path)
        return cls(manifest.step, path, manifest.sequence)


@define
class Store:
    """The checkpoints below one directory. One process writes; any number may read at the same time."""

    root: Path
    _verified: set[Path] = field(factory=set, init=False)
    """Checkpoints that this process has written or hashed, and need not hash again."""
    _removals: list[threading.Thread] = field(factory=list, init=False)
    """Free the space of deleted checkpoints, which takes a while for large files."""
    _in_use: set[Path] = field(factory=set, init=False)
    """Checkpoints that a thread reads, which ``prune`` leaves until the next time."""
    _guard: threading.Lock = field(factory=threading.Lock, init=False)

    def publish(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Any],
    ) -> Published:
        """Write a checkpoint of ``step``, whole or not at all, and durable when this returns.

        ``tensors`` and ``documents`` map the stem of a file name to its content. A checkpoint of the same step is
        replaced, and one of the two exists at any moment. On an error nothing is left behind, earlier checkpoints
        are as they were, and CheckpointError says, for a full disk, how much is needed and how much is free.
        """
        target = self.root / f"step-{step:08d}"
        path = hidden(target, f"tmp-{os.getpid()}")
        _DRAFTS.add(path)
        self.settle()
        try:
            sequence = 1 + self._last_sequence()
            with Draft(path) as draft:
                for stem, group in tensors.items():
                    draft.add_tensors(stem, group)
                for stem, document in documents.items():
                    draft.add_document(stem, document)
                self._verified.discard(target)
                if _has_newer_format(target):
                    target.rename(_unused(target.with_name(f"{target.name}.newer")))
                published = draft.publish(step, sequence, target)
        except (OSError, TypeError, ValueError) as error:
            needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
            raise self._not_written(step, error, needed) from error
        finally:
            _DRAFTS.discard(path)
        self._verified.add(target)
        return published

    def receive(self, step: int, fetch: Callable[[Path], object], check: Callable[[Checkpoint], object]) -> Checkpoint:
        """Publish a checkpoint from elsewhere as the newest, whole or not at all, once it is verified.

        ``fetch`` fills the empty directory that it is given; ``check`` raises CheckpointError for content that cannot
        be used. A damaged checkpoint of the same step is renamed, as ``quarantine`` does.
        """
        target = self.root / f"step-{step:08d}"
        path = hidden(target, f"tmp-{os.getpid()}")
        arrived = Checkpoint(step, path)
        _DRAFTS.add(path)
        try:
            with AtomicDirectory(path) as place:
                fetch(path)
                for item in path.iterdir():
                    if item.is_symlink() or not item.is_file():
                        raise CheckpointError(f"{target.name} is damaged: {item.name} is no file")
                self.verify(arrived)
                check(arrived)
                self._put_last(path)
                if target.exists():
                    self.quarantine(target, f"{target} was damaged: another copy of it was fetched")
                place.rename(target)
        finally:
            _DRAFTS.discard(path)
            self._verified.discard(path)
        self._verified.add(target)
        return Checkpoint.open(target)

    def _put_last(self, path: Path) -> None:
        """Give the checkpoint in ``path`` a place after all others."""
        manifest, last = Manifest.read(path), self._last_sequence()
        if manifest.sequence <= last:
            (path / MANIFEST).write_text(evolve(manifest, sequence=last + 1).to_json(), encoding="utf-8")

    def _last_sequence(self) -> int:
        return max((c.sequence for c in self.list() if c.sequence != UNKNOWN_SEQUENCE), default=0)

    @contextlib.contextmanager
    def in_use(self, path: Path) -> Iterator[bool]:
        """Keep ``prune`` from deleting a checkpoint meanwhile. False: it is not there any more."""
        with self._guard:
            is_there = (path / MANIFEST).exists()
            self._in_use.add(path)
        try:
            yield is_there
        finally:
            self._in_use.discard(path)

    def list(self) -> list[Checkpoint]:
        """Published checkpoints in the order they were published, oldest first. Only manifests are read."""
        return [found for found in self._candidates() if os.path.exists(found.path / MANIFEST)]

    def verify(self, checkpoint: Checkpoint, *, full: bool = True) -> None:
        """Raise CheckpointError, naming the file and what differs, unless the checkpoint is whole.

        ``full`` compares checksums; without it sizes only.
        """
        manifest = Manifest.read(checkpoint.path)
        own_name = _NAME.fullmatch(checkpoint.path.name)
        expected = int(own_name["step"]) if own_name else checkpoint.step
        if not manifest.step == checkpoint.step == expected:
            raise CheckpointError(
                f"{checkpoint.path / MANIFEST} is of step {manifest.step}, not {expected}: "
                "it belongs to another checkpoint"
            )
        for name, entry in manifest.files.items():
            check_file(checkpoint.path / name, entry, full=full)
            if full and entry.tensors is not None:
                check_tensors(checkpoint.path / name, entry.tensors)
        if full:
            self._verified.add(checkpoint.path)

    def verify_once(self, path: Path) -> None:
        """``verify`` a checkpoint that this process has neither written nor verified before."""
        if path not in self._verified:
            self.verify(Checkpoint.open(path))

    def newest_valid(
        self, check: Callable[[Checkpoint], object] = lambda checkpoint: None
    ) -> tuple[Checkpoint | None, Sequence[tuple[Path, str]]]:
        """The checkpoint published last among those that verify, and why each newer one was skipped.

        ``check`` raises CheckpointError for one whose content cannot be used. One that cannot be read now raises
        Unreadable: skipping it would lose its steps.
        """
        skipped = []
        for checkpoint in reversed(self._candidates()):
            try:
                self.verify(checkpoint, full=checkpoint.path not in self._verified)
                check(checkpoint)
            except Unreadable:
                raise
            except CheckpointError as error:
                skipped.append((checkpoint.path, str(error)))
            else:
                return checkpoint, skipped
        return None, skipped

    def quarantine(self, path: Path, reason: str) -> Path:
        """Rename a damaged checkpoint to ``*.damaged`` with the reason in it, and return the new path.

        Nothing is deleted, and a checkpoint that only a newer gpt-simple can read stays where it is.
        """
        if _has_newer_format(path):
            return path
        target = _unused(path.with_name(f"{path.name.lstrip('.')}.damaged"))
        self._verified.discard(path)
        try:
            path.rename(target)
        except OSError as error:
            raise CheckpointError(f"{path} is damaged and cannot be renamed: {error.strerror}") from error
        with contextlib.suppress(OSError):  # it is no directory, or the disk is full: the caller reports the reason too
            write_whole(target / "reason.txt", reason + "\n")
        return target

    def load_document(self, checkpoint: Checkpoint, stem: str) -> Any:
        """The content of ``stem.json``, after verification."""
        path = self._verified_file(checkpoint, f"{stem}.json")
        try:
            return parse(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None

    def layouts(self, checkpoint: Checkpoint, stem: str) -> Mapping[str, Mapping[str, Any]]:
        """``dtype`` and ``shape`` of each tensor in ``stem.safetensors``, from the manifest."""
        path = self._verified_file(checkpoint, f"{stem}.safetensors")
        return Manifest.read(checkpoint.path).files[path.name].tensors or {}

    def weight_sets(self, checkpoint: Checkpoint) -> Sequence[str]:
        """The names of the sets of weights beside the model's own."""
        files = Manifest.read(checkpoint.path).files
        return sorted(found["name"] for found in map(_WEIGHTS.fullmatch, files) if found)

    def load_tensors(self, checkpoint: Checkpoint, stem: str) -> dict[str, Tensor]:
        """The tensors of ``stem.safetensors`` by name, in host memory, after verification."""
        with self.mapped(checkpoint, stem) as tensors:
            return {name: tensor.clone() for name, tensor in tensors.items()}

    @contextlib.contextmanager
    def mapped(self, checkpoint: Checkpoint, stem: str) -> Iterator[Mapping[str, Tensor]]:
        """As ``load_tensors``, without memory of their own: only what is copied from them is read.

        They are views of the mapped file, which may be deleted or truncated once the context is left.
        """
        path = self._verified_file(checkpoint, f"{stem}.safetensors")
        with safetensors.safe_open(path, framework="pt") as file:
            yield {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def delete(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint. It disappears in one rename, so that it is never seen in part.

        A thread frees its space; the next ``publish`` and ``settle`` wait for it.
        """
        doomed = hidden(checkpoint.path, "deleted")
        self._verified.discard(checkpoint.path)
        remove_tree(doomed)
        try:
            checkpoint.path.rename(doomed)
            fsync(self.root)
        except OSError as error:
            raise CheckpointError(f"{checkpoint.path} cannot be deleted: {error.strerror}") from error
        removal = threading.Thread(target=remove_tree, args=(doomed,), name="checkpoint-removal")
        removal.start()
        self._removals.append(removal)

    def settle(self) -> None:
        """Wait until the space of deleted checkpoints is free."""
        for removal in self._removals:
            removal.join()
        self._removals = []

    def prune(
        self,
        keep_last_k: int | None,
        keep_milestone_every: int | None = None,
        protect: Collection[int] = (),
        *,
        wait: bool = True,
    ) -> Sequence[Checkpoint]:
        """Delete what retention does not keep, and leftovers of dead processes; return what was deleted.

        Kept are the ``keep_last_k`` published last (None: all), steps that are a multiple of
        ``keep_milestone_every``, steps in ``protect``, and always the newest two that verify with checksums.
        A checkpoint with a missing file or a wrong size does not count and is left for a person. ``wait`` until the
        space is free.
        """
        self.settle()
        self.sweep()
        if keep_last_k is None:
            return []
        # Without a place in the order a checkpoint must not count: it would push another one out.
        placed = [checkpoint for checkpoint in reversed(self.list()) if checkpoint.sequence != UNKNOWN_SEQUENCE]
        sound = [checkpoint for checkpoint in placed if self._is_sound(checkpoint, full=False)]
        newest = itertools.islice((c.step for c in sound if self._is_sound(c, full=True)), 2)
        kept = {*newest, *protect, *(checkpoint.step for checkpoint in sound[:keep_last_k])}
        if keep_milestone_every:
            kept |= {c.step for c in sound if c.step % keep_milestone_every == 0}
        deleted = []
        for checkpoint in reversed(sound):
            if checkpoint.step not in kept:
                # What cannot be deleted stays until the next time; no reason to end a run.
                with self._guard, contextlib.suppress(CheckpointError):
                    if checkpoint.path not in self._in_use:
                        self.delete(checkpoint)
                        deleted.append(checkpoint)
        if wait:
            self.settle()
        return deleted

    def sweep(self) -> None:
        """Remove what dead processes left; a checkpoint that was not replaced in the end gets its name back."""
        for name, path in self._entries():
            if name["role"] is None or path in _DRAFTS:
                continue
            pid = name["pid"]
            if pid is not None and int(pid) != os.getpid() and _is_alive(int(pid)):
                continue
            final = path.with_name(f"step-{name['step']}")
            if name["role"] == "replaced" and not final.exists():
                with contextlib.suppress(OSError):
                    path.rename(final)
            else:
                remove_tree(path)

    def _candidates(self) -> Sequence[Checkpoint]:
        """All that have the name of a checkpoint, whole or not, in the order of publishing.

        A replaced one counts only until its successor is there, which comes after it in the order of names.
        """
        found = {
            int(name["step"]): Checkpoint(int(name["step"]), path, _sequence_of(path))
            for name, path in self._entries()
            if name["role"] in (None, "replaced")
        }
        return sorted(found.values(), key=lambda checkpoint: (checkpoint.sequence, checkpoint.step))

    def _entries(self) -> Iterator[tuple[re.Match[str], Path]]:
        """The names that this class gives, visible and hidden, and their paths, in the order of the names."""
        try:
            for path in sorted(self.root.iterdir()):
                if name := _NAME.fullmatch(path.name):
                    yield name, path
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be read: {error.strerror}") from error

    def _is_sound(self, checkpoint: Checkpoint, *, full: bool) -> bool:
        try:
            if not (full and checkpoint.path in self._verified):
                self.verify(checkpoint, full=full)
        except CheckpointError:
            return False
        return True

    def _verified_file(self, checkpoint: Checkpoint, name: str) -> Path:
        if checkpoint.path not in self._verified:
            self.verify(checkpoint)
        if name not in Manifest.read(checkpoint.path).files:
            raise CheckpointError(f"{checkpoint.path} has no {name}: something else wrote it, or an older version")
        return checkpoint.path / name

    def _not_written(self, step: int, error: Exception, needed: int) -> CheckpointError:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        message = f"the checkpoint of step {step} was not written to {self.root}: {why}"
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            message += f"; it needs {needed / 2**20:,.1f} MiB: raise the limit of a file's size (ulimit -f)"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(nearest_existing(self.root)).free
            message += f"; it needs {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free there"
        return CheckpointError(f"{message}; earlier checkpoints are untouched")


def step_of(name: str) -> int | None:
    """The step of a checkpoint with this name; None if a checkpoint has no such name."""
    found = _NAME.fullmatch(name)
    return int(found["step"]) if found is not None and found["hidden"] is None else None


def _sequence_of(path: Path) -> int:
    try:
        return Manifest.read(path).sequence
    except CheckpointError:
        return UNKNOWN_SEQUENCE


def _has_newer_format(path: Path) -> bool:
    """Whether only a newer gpt-simple can read the checkpoint."""
    try:
        Manifest.read(path)
    except NewerFormat:
        return True
    except CheckpointError:
        pass
    return False


def _unused(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that is not there."""
    names = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    return next(free for n in names if not (free := path.with_name(f"{path.name}{n}")).exists())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is of another user
    except OverflowError:
        return False  # no process has such a number
    return True
