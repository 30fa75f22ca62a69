"""What a checkpoint holds of the model and the optimizer: tensors under the parameters' names.

torch numbers an optimizer's state by position, which silently mixes it up when a parameter is added or moved.
Here every tensor carries the name it has in the raw module, and restoring is strict in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from gpt_simple.checkpoint.packed import add_tensor, mark_of, may_be_state, pack, plain, unpack
from gpt_simple.checkpoint.sharded import local_part, part_like, sharded_like
from gpt_simple.checkpoint.tensor_names import ELSEWHERE, as_text, optimizer_tensors
from gpt_simple.errors import CheckpointError

_MOST_LISTED = 10
"""Differences that an error lists."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the raw module; a tied weight once, under its first name."""
    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        # By its storage: the address of a tensor that is sharded over processes is 0, and so is that of an empty one.
        storage = tensor.untyped_storage()._cdata
        identity = (storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        tensors[name] = tensor
    return tensors


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the raw module. CheckpointError lists every name, shape and type that differs."""
    _copy(tensors, model_tensors(model), "the checkpoint is of another model")


def load_weights(name: str, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the set of weights of this name. CheckpointError lists what differs, as for a model."""
    _copy(tensors, weights, f"the checkpoint's weights {name!r} do not fit those of this run")


def _copy(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], otherwise: str) -> None:
    _raise_if(_compare(layouts(tensors), layouts(own)), otherwise)
    with torch.no_grad():
        for name, tensor in own.items():
            local_part(tensor).copy_(part_like(tensor, tensors[name]))


@frozen(eq=False)
class OptimizerAsBuilt:
    """The options of an optimizer's groups, and its own attributes, just after it was built.

    What differs from them later is state, which some optimizers keep there and not in ``state``. What does not differ
    follows from the configuration, and may be another after a resume.
    """

    groups: Sequence[Mapping[str, tuple[Any, Any]]]
    attributes: Mapping[str, tuple[Any, Any]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> OptimizerAsBuilt:
        """Values, each with what shows a change of it."""
        groups = [{key: (value, mark_of(value)) for key, value in _options(group)} for group in optimizer.param_groups]
        return cls(groups, {name: (value, mark_of(value)) for name, value in _attributes(optimizer)})

    def changed_options(self, index: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """The options of group number ``index`` that have another value now."""
        before = self.groups[index] if index < len(self.groups) else {}
        return {key: value for key, value in _options(group) if _differs(value, before.get(key))}

    def changed_attributes(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The attributes that have another value now. A cache of functions or modules is no state."""
        return {
            name: value
            for name, value in _attributes(optimizer)
            if _differs(value, self.attributes.get(name)) and may_be_state(value)
        }


def _options(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All but the parameters and the rate, which the engine sets in every step."""
    return ((key, value) for key, value in group.items() if key not in ("params", "lr"))


def _attributes(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """The attributes of an optimizer of others: torch's keep caches and flags there, and no state."""
    if not type(optimizer).__module__.startswith("torch."):
        known = {*vars(torch.optim.SGD([torch.zeros(1)])), "grad_scale", "found_inf", "_step_supports_amp_scaling"}
        for name, value in vars(optimizer).items():
            # Another optimizer that is wrapped may share the state.
            if name not in known and getattr(value, "state", None) is not optimizer.state:
                yield name, value


def _differs(value: object, before: tuple[Any, Any] | None) -> bool:
    return before is None or mark_of(value) != before[1]


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, built: OptimizerAsBuilt | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name: tensors ``exp_avg.blocks.0.attention.query.weight``, the rest as JSON.

    With ``built``, what has changed in groups and attributes since then is state, too.
    Raises CheckpointError, naming the entry, for state that a checkpoint cannot hold.
    """
    return _flatten(optimizer, _named_parameters(optimizer, model), _device(model), built)


def _flatten(
    optimizer: torch.optim.Optimizer,
    named: Sequence[tuple[str, nn.Parameter]],
    home: torch.device,
    built: OptimizerAsBuilt | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in named:
        state = optimizer.state.get(parameter, {})
        held = {key: value for key, value in state.items() if isinstance(value, Tensor) and isinstance(key, str)}
        values, nested = {}, {}
        for key, value in state.items():
            if key in held:
                add_tensor(value, f"{key}.{name}", tensors)
            elif isinstance(key, str) and not isinstance(value, (list, tuple, dict)):
                values[key] = plain(value, f"{key}.{name}")
            else:
                nested[key] = pack(value, f"{key}.{name}", tensors, home)
        parameters[name] = {"layout": _layout(parameter), "tensors": sorted(held), "values": values}
        if nested:
            parameters[name]["nested"] = {"dict": [[plain(key, name), value] for key, value in nested.items()]}
    own = {id(parameter) for _, parameter in named}
    elsewhere: dict[str, Any] = {
        "state": {key: value for key, value in optimizer.state.items() if id(key) not in own},
        "extra": {key: v for key, v in optimizer.state_dict().items() if key not in ("state", "param_groups")},
    }
    if built is not None:
        changed = [built.changed_options(index, group) for index, group in enumerate(optimizer.param_groups)]
        elsewhere["groups"] = changed if any(changed) else []
        # An optimizer with entries of its own in state_dict keeps its attributes there.
        elsewhere["attributes"] = {} if elsewhere["extra"] else built.changed_attributes(optimizer)
    packed = {kind: pack(value, kind, tensors, home) for kind, value in elsewhere.items() if value}
    return tensors, {"optimizer": type(optimizer).__name__, "parameters": parameters, **packed}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    *,
    clone: bool = True,
) -> None:
    """Restore the state that ``flatten_optimizer`` took. CheckpointError lists every difference.

    Without ``clone`` the optimizer keeps the tensors of parameters themselves.
    """
    if (kind := type(optimizer).__name__) != document["optimizer"]:
        raise CheckpointError(f"the checkpoint has the state of {document['optimizer']}, this run uses {kind}")
    saved = document["parameters"]
    named, home = _named_parameters(optimizer, model), _device(model)
    differences = _compare({name: record["layout"] for name, record in saved.items()}, layouts(dict(named)))
    expected = optimizer_tensors(document)
    packed = {kind: document[kind] for kind in ELSEWHERE if kind in document}
    differences += [f"{name}: missing in the checkpoint" for name in sorted(expected - tensors.keys())]
    differences += [f"{name}: not expected" for name in sorted(tensors.keys() - expected)]
    elsewhere = {} if differences else {kind: unpack(value, tensors, home) for kind, value in packed.items()}
    groups = optimizer.state_dict()["param_groups"]
    if elsewhere.get("groups") and len(elsewhere["groups"]) != len(groups):
        differences.append(f"{len(elsewhere['groups'])} groups of parameters in the checkpoint, {len(groups)} here")
    _raise_if(differences, "the checkpoint's optimizer state does not fit")
    state: dict[Any, Any] = {}
    for index, (name, parameter) in enumerate(named):
        record = saved[name]
        # Cloned: torch keeps a tensor that fits as it is, and the caller's would then change with training.
        held = {key: sharded_like(parameter, tensors[f"{key}.{name}"]) for key in record["tensors"]}
        if clone:
            held = {key: tensor.clone() for key, tensor in held.items()}
        held |= record["values"] | unpack(record.get("nested", {"dict": []}), tensors, home)
        if held:
            state[index] = held
    for group, options in zip(groups, elsewhere.get("groups") or [{}] * len(groups), strict=True):
        group.update(options)
    everything = state | elsewhere.get("state", {})
    optimizer.load_state_dict({**elsewhere.get("extra", {}), "state": everything, "param_groups": groups})
    for index, (_, parameter) in enumerate(named):
        loaded = optimizer.state.get(parameter, {})
        for key in state.get(index, {}).keys() & loaded.keys() - {"step"}:
            loaded[key] = _as_saved(loaded[key], state[index][key])
    for name, value in elsewhere.get("attributes", {}).items():
        _set_attribute(optimizer, name, value)


def carry_over(
    old: torch.optim.Optimizer,
    names: Mapping[int, str],
    built: OptimizerAsBuilt,
    new: torch.optim.Optimizer,
    model: nn.Module,
) -> int:
    """Give ``new`` the state of ``old``, for each parameter that has the name, shape and type of an earlier one.

    ``names`` are those of the parameters of ``old``, by ``id``. What has changed in a group since it was ``built`` goes
    to a group with a parameter in common. Returns how many parameters of ``new`` begin without state. Raises
    CheckpointError for state that belongs to the parameters together, if these are others now.
    """
    grouped = [[names[id(parameter)] for parameter in group["params"]] for group in old.param_groups]
    held = [parameter for group in old.param_groups for parameter in group["params"]]
    named = list(zip((name for group in grouped for name in group), held, strict=True))
    tensors, document = _flatten(old, named, _device(model), built)
    saved, own = document["parameters"], dict(_named_parameters(new, model))
    same = {name for name, layout in layouts(own).items() if name in saved and saved[name]["layout"] == layout}
    if "extra" in document and not saved.keys() == own.keys() == same:
        kind = type(old).__name__
        raise CheckpointError(f"{kind} keeps state in entries of its own, which other parameters cannot take over")
    empty = {name: {"layout": layout, "tensors": [], "values": {}} for name, layout in layouts(own).items()}
    document["parameters"] = empty | {name: saved[name] for name in same}
    if "groups" in document:
        number = {name: index for index, group in enumerate(grouped) for name in group}
        options = document["groups"]["list"]
        by_name = {id(parameter): name for name, parameter in own.items()}
        common = [
            next((number[n] for p in group["params"] if (n := by_name[id(p)]) in number), None)
            for group in new.param_groups
        ]
        document["groups"] = {"list": [{"dict": []} if index is None else options[index] for index in common]}
    kept = {name: tensors[name] for name in optimizer_tensors(document)}
    restore_optimizer(new, model, kept, document, clone=False)
    return len(own) - len(same)


def _as_saved(loaded: Any, saved: Any) -> Any:
    """``saved`` on the device of ``loaded``: torch casts tensors to the parameter's dtype, and destroys text."""
    if isinstance(saved, Tensor):
        return loaded if loaded.dtype is saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _as_saved(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        return type(saved)(map(_as_saved, loaded, saved))
    return saved


def _set_attribute(optimizer: torch.optim.Optimizer, name: str, value: Any) -> None:
    own = getattr(optimizer, name, None)
    if isinstance(own, Tensor) and isinstance(value, Tensor) and _layout(own) == _layout(value):
        with torch.no_grad():
            own.copy_(value)  # other objects may hold the same tensor
    else:
        setattr(optimizer, name, value)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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
    return as_text(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def layouts(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The layout of each tensor as text."""
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
