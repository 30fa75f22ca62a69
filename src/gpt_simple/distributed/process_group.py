"""The processes of a run: devices, wrapping, and every collective there is.

Accelerate sets up processes and devices and wraps the model. It is built without mixed precision and without
accumulation, which the engine does itself, and gets neither loader nor schedule.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from attrs import define, field
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from gpt_simple.distributed.failures import FailureDetection
from gpt_simple.errors import ConfigError, GptSimpleError, RankFailed

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""How long others wait while the main process prepares data or writes a checkpoint; if it dies they know at once."""

_SHOWN = 20
"""Differences between processes that a message lists."""

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


@define(slots=False)
class ProcessGroup:
    """All processes of the run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    _accelerator: Any
    _host_group: Any = None
    _patient_group: Any = None
    _failures: FailureDetection | None = None
    _threads: int = field(factory=torch.get_num_threads)

    @classmethod
    def join(cls, timeout: float) -> ProcessGroup:
        """Set up this process (and its group, under torchrun) through Accelerate.

        ``timeout``: seconds that a process waits for the others in a step before it gives up.
        """
        for name, harmless in _CONTRADICTIONS.items():
            value = os.environ.get(name)
            if value is not None and value not in harmless:
                raise ConfigError(
                    f"${name} is {value!r}, but the configuration decides about that: unset it"
                    " (training.mixed_precision, training.gradient_accumulation_steps, training.parallel)"
                )
        threads = torch.get_num_threads()
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        size, limit = int(os.environ.get("WORLD_SIZE", "1")), timedelta(seconds=timeout)
        try:
            with warnings.catch_warnings():
                # It divides a CPU's cores among the processes; the run's first lines say how many each has.
                warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", category=UserWarning)
                accelerator = Accelerator(
                    cpu=not torch.cuda.is_available(),
                    mixed_precision="no",
                    gradient_accumulation_steps=1,
                    kwargs_handlers=[
                        DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                        InitProcessGroupKwargs(timeout=limit),
                    ],
                )
        except dist.DistError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise GptSimpleError(
                f"process {os.environ.get('RANK')} could not meet the other {size - 1} at {place} within {timeout:g} s"
                f" (training.peer_timeout_seconds): {error}"
            ) from error
        if accelerator.num_processes != size:
            raise GptSimpleError(
                f"$WORLD_SIZE is {size} but Accelerate set up {accelerator.num_processes} process(es);"
                " start with torchrun, or unset $WORLD_SIZE"
            )
        device = accelerator.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        elif device.type == "cpu":
            device = torch.device("cpu")  # with several processes it is cpu:0, to which torch copies what is on cpu
        world = cls(accelerator.process_index, size, device, accelerator, threads=threads)
        if size > 1:
            world._host_group = dist.new_group(backend="gloo", timeout=limit)
            world._patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            store = PrefixStore("gpt_simple", _get_default_store())
            world._failures = FailureDetection(world.rank, size, timeout, store)
        return world

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

    def all_reduce_max(self, flags: Sequence[int]) -> list[int]:
        """Element-wise maximum over all processes: one collective of a host tensor, so reading it is no device sync."""
        vote = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._host_group)
        return [int(flag) for flag in vote.tolist()]

    def gather(self, value: Any, *, patient: bool = True) -> list[Any]:
        """Every rank's value (plain Python objects), in the order of ranks. For rare moments, not for each step.

        ``patient``: wait for days where the main rank may be preparing data, else only ``timeout`` seconds.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._patient_group if patient else self._host_group)
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

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Run ``work``, which has no collective in it, on every process: all get their results, or all fail.

        Where it failed first (by rank) its error is raised; the others leave with RankFailed.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        codes = self.gather(None if error is None else int(getattr(error, "exit_code", 1)))
        for rank, code in enumerate(codes):
            if code is None:
                continue
            if error is not None and rank == self.rank:
                raise error
            raise RankFailed(f"process {rank} failed: its message says why", exit_code=code)
        return result  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process while the others wait; its result on every process.

        When it fails its error is raised there, and the others leave with RankFailed. All must come within the timeout;
        only what the main process does then may take its time.
        """
        self.barrier()
        result = self.all_or_none(lambda: work() if self.is_main else None)
        found: T = self.gather(result)[0]
        return found

    def main_rank_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process, then on the others, which find what it left on disk."""
        self.barrier()
        first = self.all_or_none(lambda: work() if self.is_main else None)
        return self.all_or_none(lambda: work() if first is None else first)

    def assert_same_on_all_ranks(self, facts: Callable[[], Mapping[str, Any]], remedy: str) -> None:
        """Raise ConfigError, once, with every difference if processes do not have the same ``facts``."""
        mine = self.all_or_none(facts)
        if len(set(self.gather(digest(mine)))) == 1:
            return
        everybody = self.gather(dict(mine))
        lines = [
            f"process {rank}: {key} is {theirs.get(key)!r}, but {everybody[0].get(key)!r} in process 0"
            for rank, theirs in enumerate(everybody)
            for key in {**everybody[0], **theirs}
            if theirs.get(key) != everybody[0].get(key)
        ]
        if not self.is_main:
            raise RankFailed("the processes differ: process 0 says how", exit_code=ConfigError.exit_code)
        shown = "".join(f"\n  {line}" for line in lines[:_SHOWN])
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ConfigError(f"the processes of this run differ; {remedy}:{shown}{more}")

    @contextmanager
    def explained_failures(self, step: Callable[[], int]) -> Iterator[None]:
        """Tell the others of an error that began here, and find out about theirs. ``step``: the last one made."""
        try:
            yield
        except Exception as error:
            if self._failures is None or (explained := self._failures.explain(error, step())) is error:
                raise
            raise explained from error

    def leave(self) -> None:
        """Undo what joining changed. The group stays: Accelerate keeps one per process for ever."""
        torch.set_num_threads(self._threads)


def report_once(error: GptSimpleError, seconds: float = 20.0) -> GptSimpleError:
    """What to leave with when ``error`` was found before the processes met: itself, or RankFailed where another one has
    it too and tells it, or has another. Itself as well if they do not meet within ``seconds``.
    """

    def fail() -> None:
        raise error

    try:
        ProcessGroup.join(seconds).all_or_none(
            fail
        )  # the others, if they found nothing, are in their first ProcessGroup.compare
    except RankFailed as echo:
        return echo
    except Exception:
        return error
    return error


def disband() -> None:
    """Leave the group for good, at the end of the program; NCCL complains if nobody does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
