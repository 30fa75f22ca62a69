"""The configuration of a run that an earlier version began, in the fields and defaults of this version.

A run keeps its values. A field that its checkpoint lacks has its legacy default. A field that nobody set keeps its
value where the default has changed since. Configurations are flat here: dotted key -> JSON value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import attrs

from gpt_simple.config.frozen import json_value
from gpt_simple.config.schema import Config
from gpt_simple.config.types import FieldType, fields_of

_COMPONENT_KEY = {"model": "model.name", "data": "data.source", "optimizer": "optimizer.name", "training": None}
"""Section -> the field that names the component whose class the section has."""


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values below ``path`` under their dotted keys. An empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(f"{path}.{key}" if path else str(key), item)
    else:
        yield path, value


def with_legacy_values(saved: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """``saved`` and the fields of ``config`` that it lacks. A section of another component stays as it is."""
    completed = dict(saved)
    for section, key in _COMPONENT_KEY.items():
        values = getattr(config, section)
        if key is None or saved.get(key) == getattr(values, key.partition(".")[2]):
            _complete(completed, section, type(values))
    return completed


def with_legacy_options(saved: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """As ``with_legacy_values`` for the options of the plugins in ``saved``: ``plugins.NAME.OPTION`` -> value."""
    completed = dict(saved)
    for name, table in config.plugins.tables.items():
        if f"plugins.{name}" in saved and attrs.has(type(table)):
            _complete(completed, f"plugins.{name}", type(table))
    return completed


def _complete(saved: dict[str, Any], path: str, cls: type) -> None:
    for field in fields_of(cls):
        key = f"{path}.{field.name}"
        if key in saved:
            saved[key] = _complete_items(saved[key], field.type)
        elif field.legacy_default is not attrs.NOTHING and not any(other.startswith(f"{key}.") for other in saved):
            saved.update(leaves(key, json_value(field.legacy_default)))


def _complete_items(value: Any, type_: FieldType) -> Any:
    """A list of tables (a curriculum) with the fields that they lack; any other value as it is."""
    for member in type_.members:
        if isinstance(value, list) and member.kind == "list" and member.parts[0].kind == "record":
            fields = [f for f in fields_of(member.parts[0].annotation) if f.legacy_default is not attrs.NOTHING]
            return [{field.name: json_value(field.legacy_default) for field in fields} | table for table in value]
    return value


def changed_defaults(
    saved: Mapping[str, Any], now: Mapping[str, Any], explicit: Collection[str], is_default: Callable[[str], bool]
) -> dict[str, Any]:
    """The saved values of fields whose default has changed: set neither then (``explicit``) nor now (``is_default``).

    If a default component has changed, its name alone: the other fields of its section depend on it. A field that is a
    table has no value of its own, and is left out.
    """
    sections = tuple(f"{name}." for name, key in _COMPONENT_KEY.items() if key is None or saved.get(key) == now[key])
    keys = [key for key in now if key in _COMPONENT_KEY.values() or (key.startswith(sections) and key.count(".") == 1)]
    differing = [key for key in keys if key in saved and saved[key] != now[key]]
    return {key: saved[key] for key in differing if key not in explicit and is_default(key)}
