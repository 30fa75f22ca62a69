"""A checkpoint while it is written: a hidden directory that becomes visible in one rename, or not at all."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import Factory, define, frozen
from safetensors import SafetensorError

from gpt_simple._files import AtomicDirectory
from gpt_simple.checkpoint.manifest import MANIFEST, FileEntry, Manifest, sha256_of

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
class Draft(AtomicDirectory):
    """Files are added, hashed and made durable together; ``publish`` makes them a checkpoint."""

    _entries: dict[str, FileEntry] = Factory(dict)
    _started: float = Factory(time.perf_counter)

    def add_document(self, stem: str, value: Any) -> None:
        """Write ``stem.json``. NaN and infinities are written as Python does and come back."""
        path = self.path / f"{stem}.json"
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        self._seal(path)

    def add_tensors(self, stem: str, tensors: Mapping[str, Tensor]) -> None:
        """Write ``stem.safetensors``, whatever the tensors' devices and strides."""
        import safetensors.torch  # here, because it imports torch, which listing checkpoints does not need

        path = self.path / f"{stem}.safetensors"
        try:
            safetensors.torch.save_file(_storable(tensors), path)
        except SafetensorError as error:
            raise _as_os_error(error, path) from error
        # The library gives its files mode 0600; this directory has the mode that the umask asks for.
        path.chmod(self.path.stat().st_mode & 0o666)
        layouts = {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in tensors.items()
        }
        self._seal(path, layouts)

    def publish(self, step: int, sequence: int, target: Path) -> Published:
        """Write the manifest and rename the directory to ``target``; one that is there is replaced.

        A replaced checkpoint keeps a hidden name that readers recognise until its successor is durable, so one of
        the two exists at any moment.
        """
        path = self.path / MANIFEST
        path.write_text(Manifest(step, sequence, self._entries).to_json(), encoding="utf-8")
        size = sum(entry.size for entry in self._entries.values()) + path.stat().st_size
        self.rename(target, aside=hidden(target, "replaced"))
        return Published(step, target, size, time.perf_counter() - self._started)

    def _seal(self, path: Path, layouts: Mapping[str, Any] | None = None) -> None:
        self.sync(path)
        self._entries[path.name] = FileEntry(path.stat().st_size, sha256_of(path), layouts)


def hidden(path: Path, role: str) -> Path:
    """The temporary name of a checkpoint's directory: ``.step-00001000.replaced``."""
    return path.with_name(f".{path.name}.{role}")


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors needs them: in host memory, contiguous, no two sharing a storage."""
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
