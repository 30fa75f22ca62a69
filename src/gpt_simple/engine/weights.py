"""Other weights in the model for a while: contents are exchanged in place, parameter by parameter, and always back.

An exchange needs the memory of one parameter, whatever the size of the model. Each parameter stays the same object at
the same address, so wrappers, compiled code and the optimizer do not notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from gpt_simple.checkpoint.sharded import local_part
from gpt_simple.errors import PluginError
from gpt_simple.plugin_host.dispatch import Watch

_SAMPLED = 32
"""Parameters of which a watch compares one element, spread over the model."""

_MOST_LISTED = 10
"""Mistakes in a mapping that an error lists."""

_START = 0, 0, None, False


@define(eq=False)
class Exchange(AbstractContextManager[None]):
    """Inside, each parameter has the content of its tensor, and the tensor that of the parameter.

    ``pairs``: parameters of the model, each with the tensor of the same shape and dtype; none for the model's own
    weights. Of several that are open the newest counts: the others are undone as long as it is.
    """

    pairs: Sequence[tuple[Tensor, Tensor]]
    _place: tuple[int, int, Tensor | None, bool] = field(default=_START, init=False)
    """How many pairs are exchanged, and the number that comes next. In the middle of a pair: the tensor's content, and
    whether the tensor has the parameter's already. Stored before each copy, so that Ctrl-C can interrupt anywhere."""

    def __enter__(self) -> None:
        OPEN.append(self)
        try:
            _settle()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self in OPEN:  # else a failed hook left it open, and it was undone
            OPEN.remove(self)
        _settle()

    def move(self, end: int) -> None:
        """Exchange pairs until the first ``end`` are exchanged and no other. Goes on where it was interrupted."""
        while True:
            done, following, saved, stored = self._place
            if saved is None:
                if done == end:
                    return
                following = done + 1 if done < end else done - 1
            parameter, tensor = self.pairs[min(done, following)]
            if saved is None:
                self._place = done, following, tensor.detach().to(parameter.device, copy=True), False
            elif not stored:
                tensor.copy_(parameter)
                self._place = done, following, saved, True
            else:
                parameter.copy_(saved)
                self._place = following, following, None, False


OPEN: list[Exchange] = []
"""The exchanges of this process that are open, in the order in which they were opened."""

_APPLIED: list[Exchange] = []
"""The exchange that the model has, if any."""


def undo_exchanges(count: int) -> bool:
    """Undo all but the first ``count`` that were opened. Returns whether there were any."""
    left = len(OPEN) > count
    if left or OPEN[-1:] != _APPLIED:
        del OPEN[count:]
        _settle()
    return left


@torch.no_grad()
def _settle() -> None:
    """Bring the newest exchange that is open into the model, and no other."""
    if _APPLIED and OPEN[-1:] != _APPLIED:
        _APPLIED[0].move(0)
        _APPLIED.clear()
    if OPEN:
        _APPLIED[:] = OPEN[-1:]
        _APPLIED[0].move(len(_APPLIED[0].pairs))
    torch.clear_autocast_cache()  # it holds casts of the weights that were there before


def paired(model: torch.nn.Module, weights: Mapping[str, Any]) -> Sequence[tuple[Tensor, Tensor]]:
    """Each parameter once, with its tensor. ``weights`` has one for each parameter, under one of its names.

    Raises PluginError, which lists every name and tensor that does not fit.
    """
    if not isinstance(weights, Mapping):
        raise PluginError(
            f"expected a mapping of parameter names to tensors or the name of a set, got a {type(weights).__name__}"
        )
    names: dict[int, list[str]] = {}
    owners: dict[object, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
        owners.setdefault(_memory(parameter), name)
    pairs: list[tuple[Tensor, Tensor]] = []
    problems = [f"{name}: the model has no parameter of this name" for name in weights if name not in parameters]
    for own in names.values():
        given = [name for name in own if name in weights]
        if not given:
            problems.append(f"{own[0]}: missing")
            continue
        name = given[0]
        parameter, tensor = parameters[name], weights[name]
        if problem := _misfit(parameter, tensor):
            problems.append(f"{name}: {problem}")
        elif local_part(tensor).numel() and (owner := owners.setdefault(_memory(tensor), name)) not in own:
            problems.append(f"{name}: shares its memory with {owner}")
        else:
            pairs.append((parameter, tensor))
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:_MOST_LISTED])
        rest = f"\n  and {len(problems) - _MOST_LISTED} more" if len(problems) > _MOST_LISTED else ""
        raise PluginError(f"the weights do not fit the model's parameters:{listed}{rest}")
    return pairs


def _misfit(parameter: Tensor, tensor: object) -> str:
    """Why a tensor cannot be exchanged with a parameter, or an empty string."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}; expected a tensor"
    if (layout := _layout(tensor)) != (expected := _layout(parameter)):
        return f"{layout}; the parameter is {expected}"
    if tensor.is_inference():
        return "made in inference mode, so it cannot be changed outside of it"
    if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "an expanded tensor, whose elements share their memory"
    return ""


def _layout(tensor: Tensor) -> str:
    kind = "" if tensor.layout is torch.strided and not tensor.is_meta else f" {tensor.layout} on {tensor.device.type}"
    placements = getattr(tensor, "placements", None)  # of a tensor that is sharded over processes
    kind += f" {placements}" if placements else ""
    return f"{list(tensor.shape)} {tensor.dtype}{kind}".replace("torch.", "")


def _memory(tensor: Tensor) -> object:
    return tensor.device, local_part(tensor).data_ptr()


@define(eq=False)
class WeightWatch(Watch):
    """Compares one element of some parameters with what it was when the step was marked.

    Only an optimizer step changes weights, so those after it are the reference until the next one. They stay on the
    device: the host reads them only after a failure.
    """

    _run: Any = field(default=None, init=False)
    _parameters: Sequence[Tensor] = field(default=(), init=False)
    _places: list[int] = field(factory=list, init=False)
    """Where the parameters were when ``_elements`` were taken, which are views of them."""
    _elements: list[Tensor] = field(factory=list, init=False)
    _step: int = field(default=-1, init=False)
    """The step that was marked, of which ``_kept`` has the elements."""
    _kept: Tensor = field(factory=lambda: torch.empty(0), init=False)

    def start(self, run: Any) -> None:
        """Watch ``run``: a change from here on counts. A hook before may have set values of its own."""
        found = [parameter for parameter in run.raw.parameters() if local_part(parameter).numel()]
        self._run, self._step, self._parameters = run, -1, found[:: -(-len(found) // _SAMPLED) or 1]

    def close(self) -> None:
        """Let go of the run."""
        self._run, self._parameters, self._places, self._elements = None, (), [], []
        self._kept, self.caller = torch.empty(0), None
        self.holders.clear()

    def taken(self) -> None:
        """The plugin that is called now, if any, gets the model."""
        if self.caller is not None:
            self.holders.add(self.caller)
            self.mark()

    def mark(self) -> None:
        if not self._parameters or self._run.step == self._step or OPEN:
            return
        if (places := self._places_now()) != self._places:
            parts = [local_part(parameter.detach()) for parameter in self._parameters]
            self._places, self._elements = places, [part[tuple(size // 2 for size in part.shape)] for part in parts]
        self._step, self._kept = self._run.step, torch.stack(self._elements)

    def changed(self) -> bool:
        if not self._parameters or self._run.step != self._step or OPEN:
            return False
        moved = self._places_now() != self._places
        return moved or not torch.allclose(self._kept, torch.stack(self._elements), rtol=0.0, atol=0.0, equal_nan=True)

    def _places_now(self) -> list[int]:
        return [local_part(parameter).data_ptr() for parameter in self._parameters]
