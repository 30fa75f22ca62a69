"""The device of each process, and what it is asked for: torch's CUDA calls are faked, so no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from torch.distributed.distributed_c10d import Backend, BackendConfig
from torch.nn.parallel import DistributedDataParallel

from gpt_simple import ConfigError, hardware
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.job.stages import _note_unused_gpus
from gpt_simple.launch.torchrun import Launch
from tests.conftest import Shell
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


# What each of two processes has: the number of its GPU, the id of that, and the GPUs that it is shown.
@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ((0, "a", None), (0, "a", None), True),
        ((0, "a", "0"), (0, "a", "0"), True),
        ((0, "a", None), (1, "b", None), False),
        ((0, "a", "0"), (0, "b", "1"), False),
        ((0, "a", "0"), (0, "b", "0"), False),
    ],
)
def test_processes_that_share_a_gpu_are_refused(ranks: Ranks, first: Any, second: Any, shared: bool) -> None:
    """NCCL refuses them deep inside the first collective."""

    def work(rank: int) -> str:
        number, uuid, visible = (first, second)[rank]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        group = evolve(ProcessGroup.join(20.0), device=torch.device("cuda", number))
        patch("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=uuid)).start()
        patch("torch.cuda.device_count", lambda: 1).start()
        group.assert_own_gpus()
        return "ended"

    answers = ranks(2, work)
    if not shared:
        assert answers == ["ended", "ended"]
        return
    assert [answer["silent"] for answer in answers] == [False, True]
    assert [answer["code"] for answer in answers] == [2, 2]
    assert answers[0]["text"].startswith("processes 0, 1 share GPU 0 of ")
    assert "where torch sees 1; start one process for each GPU, at most 1" in answers[0]["text"]


def test_a_launcher_refuses_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    launch = Launch.asked("2", None, None, None)
    assert launch is not None
    with pytest.raises(ConfigError, match=r"--nproc_per_node 2: torch sees one GPU here") as caught:
        launch.run(["false"])
    assert caught.value.exit_code == 2


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver and a GPU that torch does not use."""
    folder = tmp_path / "driver"
    (folder / "gpus/0").mkdir(parents=True)
    (folder / "gpus/0/information").write_text("Model: \t NVIDIA H100\n")
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    monkeypatch.setattr(hardware, "_DRIVER", folder)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, "built without CUDA and cannot use this machine's NVIDIA H100 (driver 550.54.15)"),
        ("13.0", "built for CUDA 13.0, cannot use this machine's NVIDIA H100 (driver 550.54.15)"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named(
    installed: None, shell: Shell, monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    ended = shell("run", "config.toml")
    assert ended.code == 0
    assert f"the run takes the CPU: torch {torch.__version__}" in " ".join((ended.out + ended.err).split())
    assert message in " ".join((ended.out + ended.err).split())
    ended = shell("run", "config.toml", "--nproc_per_node", "auto", "--force")
    said = " ".join(ended.err.split())
    assert ended.code == 2
    assert message in said
    assert "--nproc_per_node 1 trains on the CPU" in said


def test_a_gpu_that_is_hidden_is_not_missed(installed: None, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ended = shell("run", "config.toml")
    assert (ended.code, "H100" in ended.out + ended.err) == (0, False)


def test_one_process_on_several_gpus_gets_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    log = SimpleNamespace(info=lambda text, **fields: notes.append(text))
    for size, count in ((1, 4), (4, 4), (1, 1)):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        group = ProcessGroup(0, size, torch.device("cuda", 0))
        _note_unused_gpus(SimpleNamespace(dist=group, plugins=SimpleNamespace(log=log)))  # type: ignore[arg-type]
    assert notes == ["the run takes one of 4 GPUs: --nproc_per_node auto takes all of them"]


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_run_leaves_untested_devices_alone(shell: Shell, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    # An optimizer asks for an available one, and would ask that for its graphs.
    monkeypatch.setattr(
        "torch.accelerator.current_accelerator",
        lambda check_available=False: None if check_available else torch.device(kind),
    )
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: kind == "mps")
    monkeypatch.setattr("torch.xpu.is_available", lambda: kind == "xpu")
    ended = shell("run", "config.toml")
    assert (ended.code, ended.out.count(f"devices of type {kind} are untested")) == (0, 1)
    assert "device     cpu" in ended.out
