"""What a checkpoint holds of the model and the optimizer: tensors under the parameters' names.

torch numbers an optimizer's state by position, which silently mixes it up when a parameter is added or moved.
Here every tensor carries the name it has in the raw module, and restoring is strict in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt_simple.errors import CheckpointError

_MOST_LISTED = 10
"""Differences that an error lists."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the raw module; a tied weight once, under its first name."""
    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        tensors[name] = tensor
    return tensors


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the raw module. CheckpointError lists every name, shape and type that differs."""
    own = model_tensors(model)
    _raise_if(_compare(_layouts(tensors), _layouts(own)), "the checkpoint is of another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def flatten_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name: tensors ``exp_avg.blocks.0.attention.query.weight``, the rest as JSON.

    The options of the parameter groups are not state: they follow from the configuration and the step.
    """
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in _named_parameters(optimizer, model):
        state = optimizer.state.get(parameter, {})
        held = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"{key}.{name}": value for key, value in held.items()}
        parameters[name] = {
            "layout": _layout(parameter),
            "tensors": sorted(held),
            "values": {key: value for key, value in state.items() if key not in held},
        }
    return tensors, {"optimizer": type(optimizer).__name__, "parameters": parameters}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
) -> None:
    """Restore the state that ``flatten_optimizer`` took. CheckpointError lists every difference."""
    if (kind := type(optimizer).__name__) != document["optimizer"]:
        raise CheckpointError(f"the checkpoint has the state of {document['optimizer']}, this run uses {kind}")
    saved = document["parameters"]
    named = _named_parameters(optimizer, model)
    differences = _compare({name: record["layout"] for name, record in saved.items()}, _layouts(dict(named)))
    expected = {f"{key}.{name}" for name, record in saved.items() for key in record["tensors"]}
    differences += [f"{name}: missing in the checkpoint" for name in sorted(expected - tensors.keys())]
    differences += [f"{name}: not expected" for name in sorted(tensors.keys() - expected)]
    _raise_if(differences, "the checkpoint's optimizer state does not fit")
    state = {}
    for index, (name, _) in enumerate(named):
        record = saved[name]
        # Cloned: torch keeps a tensor that fits as it is, and the caller's would then change with training.
        held = {key: tensors[f"{key}.{name}"].clone() for key in record["tensors"]}
        if held or record["values"]:
            state[index] = held | record["values"]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _named_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter in the optimizer's own order, by which torch numbers its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := sum(id(parameter) not in names for parameter in held):
        raise CheckpointError(
            f"{foreign} parameters of the optimizer are not the model's: build it from the raw module"
        )
    return [(names[id(parameter)], parameter) for parameter in held]


def _layout(tensor: Tensor) -> str:
    shape = ", ".join(map(str, tensor.shape))
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"[{shape}]" if kind == "float32" else f"[{shape}] {kind}"


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _layout(tensor) for name, tensor in tensors.items()}


def _compare(saved: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """One line per name that differs, in the model's order."""
    lines = [
        f"{name}: checkpoint {saved.get(name, 'has none')}, model {layout}"
        for name, layout in own.items()
        if saved.get(name) != layout
    ]
    return lines + [f"{name}: checkpoint {saved[name]}, model has none" for name in saved if name not in own]


def _raise_if(differences: Sequence[str], what: str) -> None:
    if not differences:
        return
    listed = "".join(f"\n  {line}" for line in differences[:_MOST_LISTED])
    rest = f"\n  and {len(differences) - _MOST_LISTED} more" if len(differences) > _MOST_LISTED else ""
    raise CheckpointError(f"{what}; use its configuration, or start anew in another directory:{listed}{rest}")
