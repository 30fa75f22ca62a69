"""A model sharded over processes by torch's FSDP2: each process keeps a slice of every parameter.

Gradients and the optimizer's state are sharded like the parameters. Whole parameters exist for one block at a time,
gathered for its forward and its backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gpt_simple.checkpoint.sharded import local_part, part_like, whole


def shard(
    model: nn.Module,
    init_weights: Callable[[], object],
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Divide a model on the meta device over ``mesh``, and give it its starting values by its ``init_weights()``.

    They are the same bits as without sharding: each whole parameter is drawn on the host, one at a time, in the model's
    order, and a process keeps its slice. What has values already keeps those of the main process. The model computes in
    ``dtype`` (None: as it is), and gradients are reduced in fp32.
    """
    given = {name: each.detach().clone() for name, each in _tensors(model).items() if not each.is_meta}
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for module in (*model.blocks, model):  # type: ignore[misc]
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if hasattr(module, "decode"):
            register_fsdp_forward_method(module, "decode")
    model.register_forward_hook(_after_forward, always_call=True)
    model.to_empty(device=device)
    for first, *others in names.values():
        for name in others:  # to_empty has untied them
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    with torch.no_grad():
        with _WholeTensors():
            init_weights()
        for name, own in _tensors(model).items():
            if name in given:
                value = given.pop(name).to(device)
                dist.broadcast(value, 0)
                local_part(own).copy_(part_like(own, value))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _after_forward(model: nn.Module, arguments: Any, output: Any) -> None:
    if output is None:
        _forget_pass(model)
    elif not torch.is_grad_enabled():
        _reshard(model)


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Free the whole parameters that passes without gradients leave: they would stay until the next backward pass."""
    try:
        yield
    except BaseException:
        _forget_pass(model)
        raise
    _reshard(model)


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _forget_pass(model: nn.Module) -> None:
    """For a pass that failed: the run goes on if a plugin made it, and the next pass must not take over its state."""
    model.reset_iter_state()  # type: ignore[operator]


def fit_whole(model: nn.Module, device: torch.device) -> bool:
    """Whether whole parameters and gradients take at most a quarter of the memory that this process has."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = pages // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return sum(2 * parameter.nbytes for parameter in model.parameters()) <= memory / 4


class Sharded(nn.Module):
    """``module``, which is or contains a sharded model, as a train step calls it.

    ``keeps_gathered``: parameters are gathered once for all micro-batches of a step, and gradients are reduced in the
    last one, as in DDP, which takes the memory of whole parameters and gradients. Otherwise blocks are gathered for
    each pass, and gradients are reduced in every micro-batch.
    """

    def __init__(self, module: nn.Module, *, keeps_gathered: bool) -> None:
        super().__init__()
        self.module = module
        self._root = next(each for each in module.modules() if isinstance(each, FSDPModule))
        self._keeps_gathered = keeps_gathered
        if keeps_gathered:
            self._root.set_reshard_after_forward(False)  # else all but the root free their parameters

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)

    def begin(self, *, is_last: bool) -> None:
        """Prepare a micro-batch."""
        if self._keeps_gathered:
            self._root.set_requires_gradient_sync(is_last)
            self._root.set_reshard_after_backward(is_last)


class _WholeTensors(TorchDispatchMode):
    """Inside, an operation on a sharded tensor works on the whole one in host memory, and the slice is updated.

    Only what the latest operation has used is held whole. All processes run the same operations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, tuple[DTensor, Tensor]] = {}
        self._begun: set[int] = set()

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)  # type: ignore[no-untyped-call]
        self._let_go({})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {_key(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DTensor)}
        if used:
            self._let_go(used)
            for key, tensor in used.items():
                if key not in self._held:
                    self._held[key] = tensor, self._whole(key, tensor)
            args, kwargs = tree_map_only(DTensor, lambda tensor: self._held[_key(tensor)][1], (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _whole(self, key: int, tensor: DTensor) -> Tensor:
        if key in self._begun:
            return whole(tensor).cpu()
        self._begun.add(key)
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def _let_go(self, used: Mapping[int, DTensor]) -> None:
        for key in self._held.keys() - used.keys():
            tensor, value = self._held.pop(key)
            tensor.to_local().copy_(part_like(tensor, value))


def _key(tensor: DTensor) -> int:
    return int(tensor.to_local().untyped_storage()._cdata)
