"""The processes of a run: devices, wrapping, and every collective there is.

Accelerate sets up processes and devices and wraps the model. It is built without mixed precision and without
accumulation, which the engine does itself, and gets neither loader nor schedule.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from attrs import define, field

from gpt_simple.errors import ConfigError, GptSimpleError
from gpt_simple.hooks.events import Metric

T = TypeVar("T")

# Variables that would make Accelerate contradict the configuration, and the values that do no harm.
_CONTRADICTIONS = {
    "ACCELERATE_MIXED_PRECISION": ("no",),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_USE_DEEPSPEED": ("false", "0"),
    "ACCELERATE_USE_FSDP": ("false", "0"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "0"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "0"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "NO"),
    "ACCELERATE_DOWNCAST_BF16": ("no", "false", "0"),
}


class PeerFailed(GptSimpleError):
    """Another process has something to say; this one only leaves."""

    silent = True


@define(slots=False)
class World:
    """All processes of the run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    _accelerator: Any
    _host_group: Any = None
    _threads: int = field(factory=torch.get_num_threads)

    @classmethod
    def join(cls) -> World:
        """Set up this process (and its group, under torchrun) through Accelerate."""
        for name, harmless in _CONTRADICTIONS.items():
            value = os.environ.get(name)
            if value is not None and value not in harmless:
                raise ConfigError(
                    f"${name} is {value!r}, but the configuration decides about that: unset it"
                    " (training.mixed_precision, training.gradient_accumulation_steps, training.parallel)"
                )
        threads = torch.get_num_threads()
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        size = int(os.environ.get("WORLD_SIZE", "1"))
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )
        if accelerator.num_processes != size:
            raise GptSimpleError(
                f"$WORLD_SIZE is {size} but Accelerate set up {accelerator.num_processes} process(es);"
                " start with torchrun, or unset $WORLD_SIZE"
            )
        device = accelerator.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        host_group = dist.new_group(backend="gloo") if size > 1 else None
        return cls(accelerator.process_index, size, device, accelerator, host_group, threads)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose backward reduces gradients; the raw one if there is one process."""
        if self.size == 1:
            return model
        with warnings.catch_warnings():
            # Accelerate has no name yet for the option that replaces broadcast_buffers.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            wrapped: torch.nn.Module = self._accelerator.prepare_model(model)
        return wrapped

    def accumulating(self, wrapped: torch.nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch: gradients are reduced on the last one only."""
        if self.size == 1 or is_last:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(wrapped)
        return context

    def agree(self, flags: Sequence[int]) -> list[int]:
        """Element-wise maximum over all processes: one collective of a host tensor, so reading it is no device sync."""
        vote = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._host_group)
        return [int(flag) for flag in vote.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (plain Python objects), in the order of ranks. For start-up, not for the loop."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self._host_group)

    def main_only(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` on the main process while the others wait.

        When it fails its error is raised there, and the others leave with PeerFailed.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as caught:
                error = caught
        failed = any(self.gather(error is not None))
        if error is not None:
            raise error
        if failed:
            raise PeerFailed("process 0 failed: its message says why")
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process, then on the others, which find what it left on disk."""
        result = self.main_only(work)
        return result if result is not None else work()

    def reduce(self, metrics: dict[str, Metric]) -> dict[str, float]:
        """All metrics as floats, over all processes, in one collective and one read of the device."""
        # Values and weights in turn; those that are on the host already need no tensor.
        parts = [part for metric in metrics.values() for part in (metric.value, metric.weight)]
        waiting = [index for index, part in enumerate(parts) if isinstance(part, torch.Tensor)]
        born = [parts[index].detach().to(self.device, torch.float64) for index in waiting]  # type: ignore[union-attr]
        if self.size == 1:
            for index, value in zip(waiting, torch.stack(born).tolist() if born else [], strict=True):
                parts[index] = value
            rows = [parts]
        else:
            known = [0.0 if isinstance(part, torch.Tensor) else float(part) for part in parts]
            packed = torch.tensor(known, dtype=torch.float64).to(self.device, non_blocking=True)
            if born:
                packed[waiting] = torch.stack(born)
            gathered = packed.new_empty(self.size * len(parts))
            dist.all_gather_into_tensor(gathered, packed)
            rows = gathered.view(self.size, -1).tolist()
        return {
            name: _combine(metric.reduce, [(float(row[2 * i]), float(row[2 * i + 1])) for row in rows])
            for i, (name, metric) in enumerate(metrics.items())
        }

    def leave(self) -> None:
        """Undo what joining changed. The group stays: Accelerate keeps one per process for ever."""
        torch.set_num_threads(self._threads)


def _combine(how: str, pairs: list[tuple[float, float]]) -> float:
    values = [value for value, _ in pairs]
    if how == "mean":
        total = sum(weight for _, weight in pairs)
        counted = [value * weight for value, weight in pairs if weight != 0]
        return sum(counted) / total if total else float("nan")
    if how == "last":
        return values[0]
    if how == "sum":
        return sum(values)
    return max(values) if how == "max" else min(values)
