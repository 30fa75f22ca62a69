"""A checkpoint while it is written: a hidden directory that becomes visible in one rename, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from attrs import Factory, define, frozen
from safetensors import SafetensorError

from gpt_simple.checkpoint.manifest import MANIFEST, FileEntry, Manifest, TensorLayout, sha256_of

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class Published:
    """A checkpoint that is durable: where it is, its size in bytes and how long it took."""

    step: int
    path: Path
    bytes: int
    seconds: float


@define
class Draft:
    """Files are added and made durable together; ``publish`` makes them a checkpoint, leaving the context undoes them.

    The disk works in threads while the processor hashes and the next file is written.
    """

    path: Path
    _entries: dict[str, FileEntry] = Factory(dict)
    _disk: ThreadPoolExecutor = Factory(lambda: ThreadPoolExecutor(4))
    _pending: list[Future[None]] = Factory(list)
    _started: float = Factory(time.perf_counter)

    def __enter__(self) -> Self:
        remove_tree(self.path)
        self.path.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.shutdown(cancel_futures=True)
        remove_tree(self.path)

    def add_document(self, stem: str, value: Any) -> None:
        """Write ``stem.json``. NaN and infinities are written as Python does and come back."""
        path = self.path / f"{stem}.json"
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        self._seal(path)

    def add_tensors(self, stem: str, tensors: Mapping[str, Tensor]) -> None:
        """Write ``stem.safetensors``, whatever the tensors' devices and strides."""
        import safetensors.torch  # here, because it brings torch, which who only looks at checkpoints does without

        path = self.path / f"{stem}.safetensors"
        try:
            safetensors.torch.save_file(_storable(tensors), path)
        except SafetensorError as error:
            raise _as_os_error(error, path) from error
        # The library gives its files mode 0600; this directory has the mode that the umask asks for.
        path.chmod(self.path.stat().st_mode & 0o666)
        layouts = {
            name: TensorLayout(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        self._seal(path, layouts)

    def publish(self, step: int, sequence: int, target: Path) -> Published:
        """Write the manifest and rename the directory to ``target``; one that is there is replaced.

        A replaced checkpoint keeps a hidden name that readers know until its successor is durable: there is
        no moment without either.
        """
        path = self.path / MANIFEST
        path.write_text(Manifest(step, sequence, self._entries).to_json(), encoding="utf-8")
        size = sum(entry.size for entry in self._entries.values()) + path.stat().st_size
        self._pending.append(self._disk.submit(fsync, path))
        for durable in self._pending:
            durable.result()
        fsync(self.path)
        aside = hidden(target, "replaced")
        if target.exists():
            remove_tree(aside)
            target.rename(aside)
        self.path.rename(target)
        fsync(target.parent)
        remove_tree(aside)
        return Published(step, target, size, time.perf_counter() - self._started)

    def _seal(self, path: Path, layouts: Mapping[str, TensorLayout] | None = None) -> None:
        self._pending.append(self._disk.submit(fsync, path))
        self._entries[path.name] = FileEntry(path.stat().st_size, sha256_of(path), layouts)


def hidden(path: Path, role: str) -> Path:
    """The name of a checkpoint's directory while it plays a passing role: ``.step-00001000.replaced``."""
    return path.with_name(f".{path.name}.{role}")


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a hidden directory as far as possible; what cannot be removed now is swept at a later time."""
    shutil.rmtree(path, ignore_errors=True)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: in host memory, contiguous, no two sharing a storage."""
    storages: set[int] = set()
    storable: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        storable[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return storable


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(f"{path.name}: {error}")
    code = int(found[1])
    return OSError(code, os.strerror(code), str(path))
