"""Optimizers that keep state in each of the places that the optimizers of others use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

Place = Callable[["Keeps", dict[str, Any], Tensor], Tensor]


class Keeps(Optimizer):
    """SGD whose rate depends on state that ``place`` keeps: it returns the factor for a parameter's gradient."""

    place: Place

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0, "d": 1e-3, "text": "a", "best": None, "history": []})
        self.count, self.average = 0, torch.ones(())
        self.handle: object = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    factor = type(self).place(self, group, parameter).sin()  # it stays small
                    parameter -= group["lr"] * (factor * parameter.grad).to(parameter.dtype)


def _group(optimizer: Keeps, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """As schedule-free and Prodigy."""
    group["k"] += 1
    group["d"] *= 1.5
    group["best"] = max(group["d"], group["best"] or 0.0)
    group["sum"] = group.setdefault("sum", torch.zeros((), dtype=torch.float64)) + 0.1
    group["history"] = [*group["history"], group["k"]][-3:]
    return torch.as_tensor(group["k"] * group["d"] * group["best"] + sum(group["history"])) * group["sum"]


def _list(optimizer: Keeps, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """As Shampoo and SOAP."""
    state = optimizer.state[parameter]
    if not state:
        axes = [torch.zeros(size, dtype=torch.float64) for size in parameter.shape]
        state |= {"axes": axes, "pair": (1, [torch.ones(2), None]), "named": {0: torch.ones(1), "n": {"a": 1.5}}, 7: 0}
    state[7] += 1
    for axis, values in enumerate(state["axes"]):
        values += parameter.grad.double().square().sum([i for i in range(parameter.ndim) if i != axis])
    state["pair"] = (state["pair"][0] + 1, [state["pair"][1][0] * 1.1, None])
    state["named"]["n"]["a"] *= 1.1
    state["named"][0] += 0.5
    scale = state["axes"][0].sum() * state["pair"][0] * state["pair"][1][0].sum() * state[7]
    return scale * state["named"]["n"]["a"] * state["named"][0]


def _kinds(optimizer: Keeps, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """Numbers of other kinds than the parameter, which torch would cast, and text."""
    state = optimizer.state[parameter]
    if not state:
        exact, quantised = torch.ones((), dtype=torch.float64) / 3, torch.zeros((), dtype=torch.uint8)
        state |= {"exact": exact, "quantised": quantised, "mode": "fast", "flag": False, "numpy": np.float32(0.1)}
    state["exact"] /= 3
    state["quantised"] += 7
    state["numpy"] = np.float32(state["numpy"] * 1.1)
    state["flag"] = not state["flag"]
    assert (state["mode"], state["quantised"].dtype, state["exact"].dtype) == ("fast", torch.uint8, torch.float64)
    return state["exact"] * (int(state["quantised"]) // 2) * float(state["numpy"]) * (1 + state["flag"])


def _attribute(optimizer: Keeps, group: dict[str, Any], parameter: Tensor) -> Tensor:
    optimizer.count += 1
    optimizer.average *= 1.01
    optimizer.handle = print  # a cache: no state
    return optimizer.average * optimizer.count


def _no_parameter(optimizer: Keeps, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """As Lookahead and DeMo."""
    shared = optimizer.state.setdefault("shared", {"k": torch.zeros(())})  # type: ignore[call-overload]
    shared["k"] += 1
    return torch.as_tensor(shared["k"])


def _own_entries(optimizer: Keeps, group: dict[str, Any], parameter: Tensor) -> Tensor:
    optimizer.handle = {"inner": [(optimizer.handle or {"inner": [torch.ones(())]})["inner"][0] * 1.1]}  # type: ignore[index]
    return torch.as_tensor(optimizer.handle["inner"][0])


class InGroups(Keeps):
    place = _group


class InLists(Keeps):
    place = _list


class InOtherKinds(Keeps):
    place = _kinds


class InAttributes(Keeps):
    place = _attribute


class ForNoParameter(Keeps):
    place = _no_parameter


class InOwnEntries(Keeps):
    place = _own_entries

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.handle}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.handle = state_dict["inner"]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


SAVED = (InGroups, InLists, InOtherKinds, InAttributes, ForNoParameter, InOwnEntries)


class _Object:
    def __init__(self) -> None:
        self.tensor = torch.ones(())


def _put(where: str, make: Callable[[], object]) -> type[Keeps]:
    def place(optimizer: Keeps, group: dict[str, Any], parameter: Tensor) -> Tensor:
        if where == "state":
            optimizer.state[parameter]["x"] = make()
        elif where == "list":
            optimizer.state[parameter]["x"] = [make()]
        elif where == "group":
            group["x"] = make()
        else:
            optimizer.handle = make()
        return torch.ones(())

    return type("Unsavable", (Keeps,), {"place": place})


def _inner() -> Optimizer:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    inner = torch.optim.AdamW([parameter])
    inner.step()
    return inner


UNSAVABLE = {
    "an object in state": _put("state", _Object),
    "an object in a list": _put("list", _Object),
    "an object in a group": _put("group", _Object),
    "an object in an attribute": _put("attribute", _Object),
    "an optimizer in an attribute": _put("attribute", _inner),
    "a set": _put("state", lambda: {1, 2}),
    "a sparse tensor": _put("state", lambda: torch.eye(2).to_sparse()),
    "a sparse tensor in a list": _put("list", lambda: torch.eye(2).to_sparse()),
    "a tensor on the meta device": _put("group", lambda: torch.empty(1, device="meta")),
    "a complex tensor": _put("state", lambda: torch.ones(1, dtype=torch.complex128)),
}
