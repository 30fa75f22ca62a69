"""The state of plugins, as JSON and tensors: no checkpoint needs pickle.

A record is kept under its plugin's name. Tensors become references and non-finite floats become text, so that
``load_state_dict`` gets what ``state_dict`` returned (tuples come back as lists).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import define, field

from gpt_simple.errors import CheckpointError, PluginError
from gpt_simple.plugin_host.dispatch import Guard, is_dense
from gpt_simple.plugin_host.loading import LoadedPlugin

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Record = dict[str, Any]
Guarded = Callable[[LoadedPlugin, str, Callable[[], Any]], Any]

TENSOR = "$tensor"
FLOAT = "$float"
ON_DEVICE = "on_device"
"""The key of a record for the paths of tensors that were not in host memory; missing if all were."""


@define(eq=False)
class PluginStates:
    """Saves and restores the state of plugins; keeps the records of plugins that are missing or were switched off."""

    carried: dict[str, Record] = field(factory=dict)
    carried_tensors: Tensors = field(factory=dict)
    _last: dict[str, tuple[str, Record, Tensors]] = field(factory=dict)
    """Plugin -> name, record and tensors of its latest state, for when it is switched off before the next save."""

    def save(
        self, plugins: Iterable[LoadedPlugin], guarded: Guarded, sets: Mapping[str, Sequence[str]]
    ) -> tuple[dict[str, Record], Tensors]:
        """Records by plugin, and tensors by ``plugin/path``. ``guarded`` applies the failure policy.

        ``sets``: the names of each plugin's sets of weights, which are files of their own.
        """
        records, tensors = dict(self.carried), dict(self.carried_tensors)
        for plugin in plugins:
            pack_own = partial(_pack_plugin, plugin, sets.get(plugin.name))
            if packed := guarded(plugin, "state_dict", pack_own):
                records[plugin.name], own = packed
                tensors.update(own)
                self._remember(plugin, plugin.name, *packed)
            elif not plugin.failed:
                self._last.pop(plugin.name, None)
            elif plugin.name in self._last:
                name, records[name], own = self._last[plugin.name]
                tensors.update(own)
        return records, tensors

    def load(
        self,
        plugins: Iterable[LoadedPlugin],
        records: Mapping[str, Record],
        tensors: Mapping[str, torch.Tensor],
        is_main: bool,
        guard: Guard,
        device: torch.device | None,
    ) -> None:
        """Hand records back to their owners on this process, and carry those without an owner.

        ``tensors`` are in host memory. Those that were on a device are moved to ``device``; None: none is moved.
        Raises CheckpointError, before anything is loaded, if a required plugin is missing.
        """
        owners = {name: plugin for plugin in plugins for name in (*plugin.cls.aliases, plugin.name)}
        for name, record in records.items():
            if name not in owners and record["required"]:
                raise CheckpointError(
                    f"the checkpoint holds state of plugin {name!r}, without which the run must not go on: "
                    + _remedy(name, record["distribution"], record["distribution_version"])
                )
        for name, record in records.items():
            if not record["state"]:
                continue  # it has sets of weights only, and those of a missing plugin are not carried
            if (plugin := owners.get(name)) is None:
                self.carried[name] = {key: value for key, value in record.items() if key != "weights"}
                self.carried_tensors.update(_of(name, tensors))
            elif is_main or plugin.ranks == "all":
                if is_main:
                    self._remember(plugin, name, dict(record), _of(name, tensors))
                try:
                    on_device = record.get(ON_DEVICE, ()) if device is not None else ()
                    moved = {path: tensors[path].to(device) for path in on_device}
                    state = unpack(record["state"], {**tensors, **moved})
                    guard.call(partial(plugin.instance.load_state_dict, state, record["version"]))
                except BaseException as error:
                    raise plugin.failure("load_state_dict", error) from error

    def _remember(self, plugin: LoadedPlugin, name: str, record: Record, tensors: Mapping[str, torch.Tensor]) -> None:
        if plugin.on_error == "disable":  # else its failure ends the run
            copies = {path: tensor.detach().to("cpu", copy=True) for path, tensor in tensors.items()}
            self._last[plugin.name] = name, record, copies


def pack(state: Any, path: str, tensors: Tensors) -> Any:
    """JSON for ``state``; its tensors go into ``tensors`` under their path. Raises PluginError for anything else."""
    # Recognised by an attribute, because this layer never imports torch.
    if hasattr(state, "untyped_storage"):
        if not is_dense(state):
            raise PluginError(f"the state's {path} is a tensor that no file can hold", hint="expected a dense tensor")
        tensors[path] = state
        return {TENSOR: path}
    if state is None or isinstance(state, (bool, int, str)):
        return state
    if isinstance(state, float):
        return state if math.isfinite(state) else {FLOAT: str(state)}
    if isinstance(state, Mapping):
        if bad := [key for key in state if not isinstance(key, str) or key in (TENSOR, FLOAT)]:
            raise PluginError(f"the state's {path} has the key {bad[0]!r}; expected text that has no $ in front")
        # Escaped as in a JSON pointer, so that no key looks like a path.
        steps = {key: key.replace("~", "~0").replace("/", "~1") for key in state}
        return {key: pack(value, f"{path}/{steps[key]}", tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [pack(value, f"{path}/{index}", tensors) for index, value in enumerate(state)]
    raise PluginError(
        f"the state's {path} is a {type(state).__name__}; expected tensors, numbers, text, booleans, "
        "None, and mappings or lists of them"
    )


def unpack(document: Any, tensors: Mapping[str, Any]) -> Any:
    """The state that was packed. A missing tensor raises KeyError with its path."""
    if isinstance(document, Mapping):
        if document.keys() == {TENSOR}:
            return tensors[document[TENSOR]]
        if document.keys() == {FLOAT}:
            return float(document[FLOAT])
        return {key: unpack(value, tensors) for key, value in document.items()}
    if isinstance(document, list):
        return [unpack(value, tensors) for value in document]
    return document


def _of(name: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {path: tensor for path, tensor in tensors.items() if path.startswith(f"{name}/")}


def _pack_plugin(plugin: LoadedPlugin, sets: Sequence[str] | None) -> tuple[Record, Tensors] | None:
    tensors: Tensors = {}
    state = plugin.instance.state_dict()
    if not isinstance(state, Mapping):
        raise PluginError(f"it returned a {type(state).__name__}; expected a mapping")
    packed = pack(state, plugin.name, tensors)
    # Fails here, where it is the plugin's failure, and not while the checkpoint is written.
    json.dumps(packed)
    "".join(tensors).encode()
    if not (state or sets):
        return None
    record = {
        "version": plugin.cls.state_version,
        "required": plugin.cls.state_required,
        "distribution": plugin.distribution,
        "distribution_version": plugin.version,
        "state": packed,
    }
    if sets:
        record["weights"] = list(sets)
    if on_device := [path for path, tensor in tensors.items() if not tensor.is_cpu]:
        record[ON_DEVICE] = on_device
    return record, tensors


def _remedy(name: str, distribution: str, version: str) -> str:
    """How to get a plugin that a checkpoint needs back into the run."""
    if not distribution:
        return f"pass it again, with -p ./{name}.py or plugins=[...]"
    return f"activate it with -p {name} (to install it: pip install {distribution}=={version})"
