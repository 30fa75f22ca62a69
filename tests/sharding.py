"""Models that are sharded over processes, of which this process is the only one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


@contextmanager
def sharded(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is sharded block by block, as far as it has blocks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        yield
    finally:
        dist.destroy_process_group()
