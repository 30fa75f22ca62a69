"""The device of each process, and what it is asked for: torch's CUDA calls are faked, so no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, BackendConfig
from torch.nn.parallel import DistributedDataParallel

from gpt_simple.distributed.process_group import ProcessGroup
from tests.launch.conftest import Ranks

LIMIT = 7.0


class Gpus:
    """GPUs that torch sees and that compute nothing; the process group is torch's fake one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.main: dict[str, Any] = {}
        self.groups: list[dict[str, Any]] = []

    def start(self) -> None:
        """Patch torch for the rest of this process."""
        fakes = {
            "cuda.is_available": lambda: True,
            "cuda.device_count": lambda: self.count,
            "cuda.set_device": lambda device: None,
            "cuda.current_device": lambda: 0,
            "distributed.is_nccl_available": lambda: True,
            "distributed.init_process_group": self.init,
            "distributed.new_group": self.new_group,
        }
        for name, fake in fakes.items():
            patch(f"torch.{name}", fake).start()

    def init(self, backend: str, **options: Any) -> None:
        self.main = {"backend": backend, **options}
        from torch.testing._internal.distributed.fake_pg import FakeStore

        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        real_init("fake", store=FakeStore(), rank=rank, world_size=size)

    def new_group(self, **options: Any) -> Any:
        self.groups.append(options)
        return options["backend"]


real_init = dist.init_process_group


def join(rank: int, size: int, gpus: Gpus) -> ProcessGroup:
    """Process ``rank`` of ``size`` on one machine of ``gpus``."""
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    gpus.start()
    return ProcessGroup.join(LIMIT)


@pytest.mark.parametrize(("rank", "gpus", "device"), [(3, 1, "cuda:0"), (3, 4, "cuda:3"), (0, 1, "cuda:0")])
def test_ddp_gets_the_device_of_the_process(ranks: Ranks, rank: int, gpus: int, device: str) -> None:
    """A process that sees one GPU has number 0 of it, whatever the number of the process is."""

    def work(_: int) -> list[Any]:
        group = join(rank, 4, Gpus(gpus))
        with patch.object(DistributedDataParallel, "__init__", return_value=None) as init:
            group.wrap(torch.nn.Linear(1, 1))
        return [str(group.device), init.call_args.kwargs["device_ids"]]

    assert ranks(1, work) == [[device, [torch.device(device).index]]]


def test_a_gradient_waits_longer_than_the_vote(ranks: Ranks) -> None:
    """Else NCCL's watchdog ends the innocent processes before they can name the one that hangs."""

    def work(_: int) -> list[float]:
        gpus = Gpus(4)
        join(0, 4, gpus)
        return [seconds.total_seconds() for seconds in (gpus.main["timeout"], gpus.groups[0]["timeout"])]

    assert ranks(1, work) == [[LIMIT + 120, LIMIT]]


def as_nccl(tensors: Any, *values: Any, group: Any = None, **options: Any) -> None:
    """A collective of torch's, which finds the backend by the device of the tensor."""
    types = {"cpu"} if group == "gloo" else set(BackendConfig(Backend("nccl")).get_device_backend_map())
    if isinstance(tensors, torch.Tensor) and tensors.device.type not in types:
        raise RuntimeError(f"No backend type associated with device type {tensors.device.type}")
    if not isinstance(tensors, torch.Tensor):
        assert group == "gloo", "NCCL would copy pickled objects to the device and back"


@pytest.mark.parametrize(
    "collective",
    [
        lambda group: group.sum(torch.ones(1)),
        lambda group: group.sum(torch.ones(1, device="meta")),
        lambda group: group.all_reduce_max([1]),
        lambda group: group.gather(1),
        lambda group: group.gather(1, patient=False),
        lambda group: group.barrier(),
        lambda group: group.all_or_none(lambda: 1),
    ],
    ids=["sum", "sum on the device", "max", "gather", "vote", "barrier", "all or none"],
)
def test_host_values_cross_the_network_beside_nccl(ranks: Ranks, collective: Callable[[Any], Any]) -> None:
    def work(_: int) -> str:
        group = join(0, 2, Gpus(2))
        for name in ("all_reduce", "all_gather_object"):
            patch(f"torch.distributed.{name}", as_nccl).start()
        patch("torch.distributed.barrier", lambda group: as_nccl([], group=group)).start()
        # A tensor that is on no host stands for one of a GPU.
        patch.object(BackendConfig, "get_device_backend_map", lambda self: {"cuda": "nccl", "meta": "nccl"}).start()
        collective(group)
        return "ended"

    assert ranks(1, work) == ["ended"]
