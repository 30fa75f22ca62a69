"""The state of plugins, as JSON and tensors: nothing that a checkpoint holds needs pickle to come back.

A record stays tied to its plugin's name. Tensors are replaced by a reference and floats that JSON lacks are
spelled out, so ``load_state_dict`` gets what ``state_dict`` gave (tuples come back as lists).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attrs import define, field

from gpt_simple.errors import CheckpointError, PluginError
from gpt_simple.hooks.loading import FAILURES, LoadedPlugin, install_line

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Record = dict[str, Any]
Guarded = Callable[[LoadedPlugin, str, Callable[[], Any]], Any]

TENSOR = "$tensor"
FLOAT = "$float"


@define(eq=False)
class PluginStates:
    """Saves and restores the state of plugins; keeps the records of those that are not here."""

    carried: dict[str, Record] = field(factory=dict)
    carried_tensors: Tensors = field(factory=dict)

    def save(self, plugins: Iterable[LoadedPlugin], guarded: Guarded) -> tuple[dict[str, Record], Tensors]:
        """Records by plugin, and tensors by ``plugin/path``. ``guarded`` applies the failure policy."""
        records, tensors = dict(self.carried), dict(self.carried_tensors)
        for plugin in plugins:
            if packed := guarded(plugin, "state_dict", lambda: _pack_plugin(plugin)):  # noqa: B023
                records[plugin.name], own = packed
                tensors.update(own)
        return records, tensors

    def load(
        self,
        plugins: Iterable[LoadedPlugin],
        records: Mapping[str, Record],
        tensors: Mapping[str, torch.Tensor],
        is_main: bool,
    ) -> None:
        """Hand records back to their owners on this process, and carry those without an owner.

        A record whose plugin said that it is required and is not here raises CheckpointError before anything
        is loaded.
        """
        owners = {name: plugin for plugin in plugins for name in (*plugin.cls.aliases, plugin.name)}
        for name, record in records.items():
            if name not in owners and record["required"]:
                line = install_line(record["distribution"], record["distribution_version"])
                raise CheckpointError(
                    f"the checkpoint holds state of plugin {name!r}, without which the run must not go on: "
                    f"activate it with -p {name} (to install it: {line})"
                )
        for name, record in records.items():
            if (plugin := owners.get(name)) is None:
                self.carried[name] = dict(record)
                self.carried_tensors.update({k: t for k, t in tensors.items() if k.startswith(f"{name}/")})
            elif is_main or plugin.ranks == "all":
                try:
                    plugin.active.load_state_dict(unpack(record["state"], tensors), record["version"])
                except FAILURES as error:
                    raise plugin.failure("load_state_dict", error) from error


def pack(state: Any, path: str, tensors: Tensors) -> Any:
    """JSON for ``state``; its tensors go into ``tensors`` under their path. PluginError at anything else."""
    # Told by what it has, because this layer never imports torch.
    if hasattr(state, "untyped_storage"):
        tensors[path] = state
        return {TENSOR: path}
    if state is None or isinstance(state, (bool, int, str)):
        return state
    if isinstance(state, float):
        return state if math.isfinite(state) else {FLOAT: str(state)}
    if isinstance(state, Mapping):
        if bad := [key for key in state if not isinstance(key, str) or key in (TENSOR, FLOAT)]:
            raise PluginError(f"the state's {path} has the key {bad[0]!r}; expected text that has no $ in front")
        return {key: pack(value, f"{path}/{key}", tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [pack(value, f"{path}/{index}", tensors) for index, value in enumerate(state)]
    raise PluginError(
        f"the state's {path} is a {type(state).__name__}; expected tensors, numbers, text, booleans, "
        "None, and mappings or lists of them"
    )


def unpack(document: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What was packed. A tensor that is missing raises KeyError with its path."""
    if isinstance(document, Mapping):
        if document.keys() == {TENSOR}:
            return tensors[document[TENSOR]]
        if document.keys() == {FLOAT}:
            return float(document[FLOAT])
        return {key: unpack(value, tensors) for key, value in document.items()}
    if isinstance(document, list):
        return [unpack(value, tensors) for value in document]
    return document


def _pack_plugin(plugin: LoadedPlugin) -> tuple[Record, Tensors] | None:
    tensors: Tensors = {}
    state = plugin.active.state_dict()
    if not state:
        return None
    record = {
        "version": plugin.cls.state_version,
        "required": plugin.cls.state_required,
        "distribution": plugin.distribution,
        "distribution_version": plugin.version,
        "state": pack(state, plugin.name, tensors),
    }
    return record, tensors
