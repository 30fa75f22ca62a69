"""Checkpoints that are written by a thread while training goes on.

Training waits only until the state is copied; the copy is checked for weights that are not finite. At most one
checkpoint is written at a time, so the memory of the copies is used again and writes never queue up.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from attrs import define, field

from gpt_simple.checkpoint.draft import Published
from gpt_simple.checkpoint.store import Store
from gpt_simple.data.host_memory import host_tensors
from gpt_simple.engine.loss_monitor import all_finite


class NotFinite(Exception):
    """The checkpoint's weights are not finite; nothing was written."""


@define
class BackgroundWriter:
    """Writes one checkpoint at a time, in the process that owns the store."""

    store: Store
    _pool: ThreadPoolExecutor = field(factory=lambda: ThreadPoolExecutor(1, "checkpoint"), init=False)
    _writing: Future[Published] | None = field(default=None, init=False)
    _copies: dict[tuple[str, str], torch.Tensor] = field(factory=dict, init=False)
    """By stem and name. The next checkpoint uses their memory again."""

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        documents: Mapping[str, Any],
        *,
        must_be_finite: Collection[str],
        are_copies: bool = False,
    ) -> None:
        """Copy everything and return; the caller may change it from then on. Take the last ``result`` before.

        ``must_be_finite``: names in ``model``. ``are_copies``: the caller has made copies in host memory.
        """
        assert self._writing is None
        copies = {stem: dict(group) for stem, group in tensors.items()}
        if not are_copies:
            self._copy({(stem, name): tensor for stem, group in tensors.items() for name, tensor in group.items()})
            copies = {stem: {name: self._copies[stem, name] for name in group} for stem, group in tensors.items()}
        copied = json.loads(json.dumps(documents))
        self._writing = self._pool.submit(self._write, step, copies, copied, must_be_finite)

    def result(self, *, wait: bool) -> Published | None:
        """The checkpoint that was begun, once it is durable, one time; None while it is being written.

        Raises, one time, CheckpointError if it could not be written and NotFinite if it must not be.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        ended, self._writing = self._writing, None
        return ended.result()

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._pool.shutdown()

    def _write(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        documents: Mapping[str, Any],
        must_be_finite: Collection[str],
    ) -> Published:
        if not all_finite(tensor for name, tensor in tensors["model"].items() if name in must_be_finite):
            raise NotFinite
        return self.store.publish(step, tensors=tensors, documents=documents)

    def _copy(self, tensors: Mapping[tuple[str, str], torch.Tensor]) -> None:
        """Copy all, and wait for the device once."""
        if _layouts(tensors) != _layouts(self._copies):
            self._copies = {}  # first, so that old and new ones do not exist together
            self._copies = host_tensors(tensors, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        for key, tensor in tensors.items():
            self._copies[key].copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _layouts(tensors: Mapping[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], Any]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
