"""The tensors of a checkpoint, of which each process of a sharded run has a part."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gpt_simple.checkpoint.sharded import is_sharded, local_part, whole
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.errors import PluginError, RankFailed

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by the stem of the file that they go to."""


def gather_state(group: ProcessGroup, tensors: Groups) -> dict[str, dict[str, Tensor]]:
    """Copies of all tensors, whole and in host memory, on the main process, and nothing on the others.

    All processes of ``group`` call it together. They gather one tensor at a time, which only the main one keeps. Raises
    PluginError, once, for a sharded tensor that some processes do not have.
    """
    names = sorted((stem, name) for stem, part in tensors.items() for name in part)
    _refuse_partial(group, [(stem, name) for stem, name in names if is_sharded(tensors[stem][name])])
    gathered: dict[str, dict[str, Tensor]] = {stem: {} for stem in tensors}
    for stem, name in names:
        tensor = tensors[stem][name].detach()
        if group.is_main or is_sharded(tensor):
            value = whole(tensor)
            if group.is_main:
                gathered[stem][name] = value.to("cpu", copy=value.data_ptr() == local_part(tensor).data_ptr())
    return gathered


def _refuse_partial(group: ProcessGroup, sharded: list[tuple[str, str]]) -> None:
    """Raise PluginError, once, unless all processes have the same sharded tensors."""
    everywhere = [set(others) for others in group.gather(sharded, patient=False)]
    if not (partial := set.union(*everywhere) - set.intersection(*everywhere)):
        return
    if not group.is_main:
        raise RankFailed("not all processes have a part of each tensor: process 0 names it", exit_code=5)
    stem, name = min(partial)
    raise PluginError(
        f"{name} of {stem} is sharded over the processes, and not all of them have it in the state to be saved",
        hint='a plugin that keeps sharded tensors runs on every process: ranks = "all"',
    )
