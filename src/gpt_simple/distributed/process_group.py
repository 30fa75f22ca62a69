"""The processes of a run: devices, wrapping, and every collective there is.

Accelerate sets up processes and devices, and nothing else: it gets neither model nor loader nor schedule. The model is
wrapped here, for the device that this process has, which need not have the number of the process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from attrs import evolve, field, frozen
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.nn.parallel import DistributedDataParallel

from gpt_simple.distributed.failures import FailureDetection
from gpt_simple.distributed.start_up import StartUp, start_up
from gpt_simple.errors import ConfigError, GptSimpleError, RankFailed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""How long others wait while the main process prepares data or writes a checkpoint; if it dies they fail at once."""

_WATCHDOG_SECONDS = 120.0
"""How much longer NCCL waits than the vote of the hosts. Its watchdog ends a process without a word, so it comes last.
"""

_NAME_SECONDS = 5.0
"""How long the name of the machine at which the processes meet may be unknown."""

_INTERFACE = "GLOO_SOCKET_IFNAME"

_SET_INTERFACE = (
    f"set ${_INTERFACE} and $NCCL_SOCKET_IFNAME to the network interface that the machines share, which"
    " `ip route get ADDRESS` of another machine shows"
)

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
    "ACCELERATE_USE_CPU": ("no", "false", "0"),
    "ACCELERATE_TORCH_DEVICE": (),
}


_PLACE = ("RANK", "LOCAL_RANK")
"""The variables by which a process is one of several."""


@frozen(eq=False)
class ProcessGroup:
    """All processes of the run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """The processes over which the model is sharded; None if each has all of it."""
    _host_group: Any = None
    _patient_group: Any = None
    _failures: FailureDetection | None = None
    _starting: StartUp | None = None
    _threads: int = field(factory=torch.get_num_threads)

    @classmethod
    def join(cls, timeout: float, starting: StartUp | None = None) -> ProcessGroup:
        """Set up this process (and its group, under torchrun) through Accelerate.

        ``timeout``: seconds that a process waits for the others in a step before it gives up. ``starting``: how it
        hears of a stop while it waits for them, until ``started`` is called.
        """
        for name, harmless in _CONTRADICTIONS.items():
            value = os.environ.get(name)
            if value is not None and value not in harmless:
                raise ConfigError(
                    f"${name} is {value!r}, but the configuration decides about that: unset it"
                    " (training.mixed_precision, training.gradient_accumulation_steps, training.parallel, and"
                    " $CUDA_VISIBLE_DEVICES for devices)"
                )
        threads = torch.get_num_threads()  # before Accelerate changes their number
        state = _set_up(timeout, starting)
        rank, size, device = state.process_index, state.num_processes, state.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        elif device.type == "cpu":
            device = torch.device("cpu")  # with several processes it is cpu:0, to which torch copies what is on cpu
        if size == 1:
            return cls(rank, size, device, threads=threads)
        with _explained_meeting(timeout, timeout):
            host_group, patient_group = (
                _wait(starting, partial(dist.new_group, backend="gloo", timeout=limit))
                for limit in (timedelta(seconds=timeout), _PATIENCE)
            )
        return cls(
            rank,
            size,
            device,
            host_group=host_group,
            patient_group=patient_group,
            failures=FailureDetection(rank, size, timeout, PrefixStore("gpt_simple", _get_default_store())),
            starting=starting,
            threads=threads,
        )

    @property
    def shards(self) -> bool:
        """Whether each process has only its part of the model."""
        return self.mesh is not None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def started(self) -> None:
        """End the start: from now on a stop takes effect where all processes decide about it."""
        if self._starting is not None:
            self._starting.end()

    def sharding(self, shard_size: int | None, timeout: float) -> ProcessGroup:
        """The same processes, with the model sharded over them: over each ``shard_size`` in turn, None: over all.

        Raises ConfigError, once, if their number is no multiple of ``shard_size``. ``timeout``: that of ``join``.
        """
        if self.size == 1:
            return self
        self.all_or_none(lambda: _check_divides(self.size, shard_size))
        return evolve(self, mesh=_wait(self._starting, partial(_mesh, self.device, self.size, shard_size, timeout)))

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose backward reduces gradients; the raw one if there is one process, or nothing to train."""
        if self.size == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        if self.mesh is not None:
            from gpt_simple.distributed.sharding import Sharded, fit_whole

            short = self.all_reduce_max([not fit_whole(model, self.device)])
            return Sharded(model, keeps_gathered=not any(short))
        with warnings.catch_warnings():
            # Its successor still sends the buffers once, and torch before 2.13 has none.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    def resharding(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """The context of passes that are not ``model(...)``, of which a sharded model would keep whole parameters."""
        if self.mesh is None:
            return nullcontext()
        from gpt_simple.distributed.sharding import resharding

        return resharding(model)

    def release_wrapped(self) -> None:
        """Free what ``wrap`` has returned and nothing refers to: its buckets and its hooks on gradients."""
        if self.size > 1:
            gc.collect()  # it refers to itself

    def accumulating(self, wrapped: Any, is_last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch: gradients are reduced on the last one only."""
        if self.mesh is not None:
            wrapped.begin(is_last=is_last)
            return nullcontext()
        if is_last or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()

    def all_reduce_max(self, flags: Sequence[int]) -> list[int]:
        """Element-wise maximum over all processes: one collective of a host tensor, so reading it is no device sync."""
        if self.size == 1:
            return [int(flag) for flag in flags]
        highest = torch.tensor(flags, dtype=torch.int64)
        _wait(self._starting, lambda: dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._host_group))
        return [int(flag) for flag in highest.tolist()]

    def gather(self, value: Any, *, patient: bool = True) -> list[Any]:
        """Every rank's value (plain Python objects), in the order of ranks. Too slow for every step.

        ``patient``: wait for days where the main rank may be preparing data, else only ``timeout`` seconds.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        group = self._patient_group if patient else self._host_group
        _wait(self._starting, lambda: dist.all_gather_object(values, value, group=group))
        return values

    def of_main(self, number: int) -> int:
        """The main process's ``number``, on all of them: one collective of a host tensor."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.broadcast(value, 0, group=self._host_group)
        return int(value)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on the device of ``value``."""
        if self.size > 1:
            value = value.clone()
            # NCCL takes no host tensors, and a copy to the GPU and back would wait for it.
            is_on_host = value.device.type == "cpu" and self.device.type != "cpu"
            dist.all_reduce(value, group=self._host_group if is_on_host else None)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            _wait(self._starting, lambda: dist.barrier(group=self._host_group))

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Run ``work``, which has no collective in it, on every process: all get their results, or all fail.

        The first process (by rank) on which it fails raises its error; the others raise RankFailed.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        codes = self.gather(None if error is None else int(getattr(error, "exit_code", 1)))
        for rank, code in enumerate(codes):
            if code is not None:
                other = RankFailed(f"process {rank} failed: its message says why", exit_code=code)
                raise error if error is not None and rank == self.rank else other
        return result  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process while the others wait; its result on every process.

        If it fails, the main process raises its error and the others raise RankFailed. All processes must arrive within
        the timeout; ``work`` itself may take longer.
        """
        self.barrier()
        result = self.all_or_none(lambda: work() if self.is_main else None)
        return self.gather(result)[0]  # type: ignore[no-any-return]

    def main_rank_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process, then on the others, which find on disk what it has written."""
        self.barrier()
        result = self.all_or_none(lambda: work() if self.is_main else None)
        return self.all_or_none(lambda: work() if result is None else result)

    def assert_same_on_all_ranks(self, facts: Callable[[], Mapping[str, Any]], remedy: str) -> None:
        """Raise ConfigError, once, with every difference if processes do not have the same ``facts``."""
        mine = self.all_or_none(facts)
        if len(set(self.gather(digest(mine)))) == 1:
            return
        main, *others = self.gather(dict(mine))
        if not self.is_main:
            raise RankFailed("the processes differ: process 0 lists the differences", exit_code=ConfigError.exit_code)
        lines = [
            f"process {rank}: {key} is {other.get(key)!r}, but {main.get(key)!r} in process 0"
            for rank, other in enumerate(others, 1)
            for key in {**main, **other}
            if other.get(key) != main.get(key)
        ]
        shown = "".join(f"\n  {line}" for line in lines[:_SHOWN])
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ConfigError(f"the processes of this run differ; {remedy}:{shown}{more}")

    def assert_own_gpus(self) -> None:
        """Raise ConfigError, once, if processes share a GPU, which NCCL refuses much later."""
        if self.size == 1 or self.device.type != "cuda":
            return
        uuid = str(getattr(torch.cuda.get_device_properties(self.device), "uuid", ""))
        # Machines may have the same name, and a task of srun may see its own GPU alone, as number 0.
        place = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"), self.device.index, uuid
        ranks: dict[Any, list[int]] = {}
        for rank, other in enumerate(self.gather((*place, torch.cuda.device_count()), patient=False)):
            ranks.setdefault(other, []).append(rank)
        shared = [(found, sharing) for found, sharing in ranks.items() if len(sharing) > 1]
        if not shared:
            return
        if not self.is_main:
            raise RankFailed("process 0 reports who shares a GPU", exit_code=ConfigError.exit_code)
        (machine, _, number, _, count), sharing = shared[0]
        raise ConfigError(
            f"processes {', '.join(map(str, sharing))} share GPU {number} of {machine}, where torch sees {count}",
            hint=f"start one process for each GPU, at most {count} on that machine",
        )

    @contextmanager
    def explained_failures(self, step: Callable[[], int]) -> Iterator[None]:
        """Record an error of this process for the others, or explain it by theirs. ``step()`` is the last finished."""
        try:
            yield
        except Exception as error:
            if self._failures is None or (explained := self._failures.explain(error, step())) is error:
                raise
            raise explained from error

    def leave(self) -> None:
        """Undo what joining changed. The group stays: Accelerate keeps one per process for ever."""
        torch.set_num_threads(self._threads)


def _wait(starting: StartUp | None, collective: Callable[[], T]) -> T:
    return collective() if starting is None else starting.wait(collective)


def _check_divides(size: int, shard_size: int | None) -> None:
    if shard_size is not None and size % shard_size:
        raise ConfigError(
            f"{size} processes cannot be divided into groups of {shard_size}",
            key="training.shard_size",
            hint="expected a divisor of the number of processes, such as the GPUs of a machine",
        )


def _mesh(device: torch.device, size: int, shard_size: int | None, timeout: float) -> DeviceMesh:
    """The processes in rows of ``shard_size`` neighbours, which share a model; one row: they have one dimension."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if shard_size in (None, size):
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    rows = torch.arange(size).view(-1, shard_size or size)
    limit = timedelta(seconds=_device_seconds(timeout, device.type == "cuda"))
    new_groups: Callable[..., Any] = dist.new_subgroups_by_enumeration
    groups = [new_groups(each.tolist(), timeout=limit)[0] for each in (rows.T, rows)]
    return DeviceMesh.from_group(groups, device.type, rows, mesh_dim_names=("replicate", "shard"))


def _device_seconds(timeout: float, has_gpu: bool) -> float:
    """How long the collectives of devices wait."""
    return timeout + _WATCHDOG_SECONDS if has_gpu else timeout


def _require_place(size: int) -> None:
    """Raise ConfigError if this is one of several processes and the variables that place it are missing or wrong."""
    if size == 1:
        return
    if missing := [f"${name}" for name in (*_PLACE, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ConfigError(
            f"$WORLD_SIZE is {size}, and {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set",
            hint="start with torchrun or --nproc_per_node, or unset $WORLD_SIZE to train in one process",
        )
    for name in _PLACE:
        if not (text := os.environ[name]).isdecimal() or int(text) >= size:
            raise ConfigError(f"${name} is {text!r}: expected a number below $WORLD_SIZE, which is {size}")
    if not os.environ["MASTER_PORT"].isdecimal():
        raise ConfigError(f"$MASTER_PORT is {os.environ['MASTER_PORT']!r}: expected the number of a port")


def _find_address(seconds: float) -> None:
    """Raise ConfigError if the name of the address is not found within ``seconds``: new machines get theirs late."""
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, int(os.environ["MASTER_PORT"]))
            return
        except (OSError, OverflowError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"$MASTER_ADDR is {host!r}, a host that cannot be found ({error})",
                    hint="set it to the name or the address of the machine of process 0",
                ) from None
        time.sleep(0.5)


def _require_reachable(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if gloo would offer the other machines an address that means each machine itself.

    It takes the address of the machine's own name. Processes with such a MASTER_ADDR are on one machine.
    """
    several = environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]) != environment["WORLD_SIZE"]
    if not several or _INTERFACE in environment or _is_loopback(environment["MASTER_ADDR"]):
        return
    if _is_loopback(name := socket.gethostname()):
        raise ConfigError(f"{name}, the name of this machine, is no address for other machines", hint=_SET_INTERFACE)


def _is_loopback(host: str) -> bool:
    """Whether a host, by its first address, is this machine for every machine. torch takes an unknown one for that."""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return True
    return ip_address(address).is_loopback


@contextmanager
def _explained_meeting(timeout: float, seconds: float) -> Iterator[None]:
    """Raise GptSimpleError for processes that do not meet within ``seconds``."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        place, others = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", os.environ["WORLD_SIZE"]
        has_no_store = isinstance(error, (dist.DistStoreError, dist.DistNetworkError))
        raise GptSimpleError(
            f"process {os.environ.get('RANK')} could not meet the other {int(others) - 1} at {place} within"
            f" {seconds:g} s (training.peer_timeout_seconds is {timeout:g}): {str(error).splitlines()[0]}",
            hint=""
            if has_no_store
            else f"on a machine whose `hostname -i` shows a loopback address (127...), {_SET_INTERFACE}",
        ) from error


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """The environment without some variables."""
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


def _set_up(timeout: float, starting: StartUp | None) -> Any:
    """Accelerate's state of this process. Raises GptSimpleError if the processes do not meet."""
    from accelerate import PartialState

    size = int(os.environ.get("WORLD_SIZE", "1"))
    _require_place(size)

    has_gpu = torch.cuda.is_available()
    seconds = _device_seconds(timeout, has_gpu)

    def meet() -> tuple[Any, int]:
        if size > 1:
            _find_address(min(timeout, _NAME_SECONDS))
            _require_reachable(os.environ)
        state = PartialState(cpu=not has_gpu, timeout=timedelta(seconds=seconds))
        return state, torch.get_num_threads()

    # One process needs no rendezvous: without these variables Accelerate does not wait at an address.
    with _explained_meeting(timeout, seconds), _without(_PLACE if size == 1 else ()), warnings.catch_warnings():
        # It divides a CPU's cores among the processes; the run's first lines say how many each has.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", category=UserWarning)
        state, threads = _wait(starting, meet)
    if state.num_processes != size:
        raise GptSimpleError(
            f"$WORLD_SIZE is {size} but Accelerate set up {state.num_processes} process(es);"
            " start with torchrun, or unset $WORLD_SIZE"
        )
    # Accelerate sets both for the thread that it runs in.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if size > 1 and state.device.type == "cuda":
        torch.cuda.set_device(state.device)
    return state


@frozen
class _Pending:
    """Signals that arrived, of which none stops more than the wait for other processes."""

    names: Sequence[str]

    @property
    def reason(self) -> str:
        return self.names[0] if self.names else ""

    def stop_now(self, reason: str) -> NoReturn:
        raise RankFailed(reason, silent=False)


def report_once(error: GptSimpleError, seconds: float = 20.0, pending_signals: Sequence[str] = ()) -> GptSimpleError:
    """The error to raise for ``error``, found before the processes met, so that only one of them reports it.

    ``error`` itself on the first process that has one, and if they do not meet within ``seconds`` or before a signal
    is in the live list ``pending_signals``; else RankFailed.
    """

    def fail() -> None:
        raise error

    try:
        # A process without an error is in its first assert_same_on_all_ranks, which begins in the same way.
        with start_up(_Pending(pending_signals), 2, seconds) as starting:
            ProcessGroup.join(seconds, starting).all_or_none(fail)
    except RankFailed as secondary:
        return secondary if secondary.silent else error
    except Exception:
        return error
    return error


def disband() -> None:
    """Leave the group for good, at the end of the program; NCCL complains otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


def digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
