"""The configuration of a run that an earlier version began, in the fields and defaults of this version.

A run keeps its values. A field that its checkpoint lacks has its legacy default. A field that was set neither when the
run began nor now keeps its value if the default has changed. Configurations are flat here: dotted key -> JSON value.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve

from gpt_simple.config.frozen import json_value
from gpt_simple.config.redact import redacted
from gpt_simple.config.schema import Config
from gpt_simple.config.types import FieldType, fields_of
from gpt_simple.errors import GptSimpleError
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from gpt_simple.spec import RunSpec

_COMPONENT_KEY = {"model": "model.name", "data": "data.source", "optimizer": "optimizer.name", "training": None}
"""Section -> the field that names the component whose class the section has."""


def flatten(config: Config) -> dict[str, Any]:
    """Every field that is set or defaulted, without secrets: the result is written to disk.

    ``[model]`` holds none, and is needed as it is to build the model again.
    """
    # As they come back from a file: tuples become lists.
    values = json.loads(json.dumps(attrs.asdict(config), default=_plain))
    return dict(_leaves("", {**redacted(values), "model": values["model"]}))


def _plain(value: Any) -> Any:
    """A value that JSON has no type for, as it stands in a file."""
    return value.value if isinstance(value, Enum) else str(value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values below ``path`` under their dotted keys. An empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
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
            saved.update(_leaves(key, json_value(field.legacy_default)))


def _complete_items(value: Any, type_: FieldType) -> Any:
    """A list of tables (a curriculum) with the fields that they lack; any other value as it is."""
    for member in type_.members:
        if isinstance(value, list) and member.kind == "list" and member.parts[0].kind == "record":
            fields = [f for f in fields_of(member.parts[0].annotation) if f.legacy_default is not attrs.NOTHING]
            return [{field.name: json_value(field.legacy_default) for field in fields} | table for table in value]
    return value


def keep_values_of_run(spec: RunSpec, *, force: bool) -> RunSpec:
    """``spec`` with the values of the run that it resumes, for fields that were set neither then nor now.

    Raises ConfigError if these values contradict those that are set now. Whether the run can be resumed is decided
    later.
    """
    training = spec.config.training
    if force or training.resume == "scratch":
        return spec
    named = [] if training.resume == "auto" else [Path(training.resume).absolute().parent.parent]
    for run_dir in map(RunDir, [Path(training.output_dir), *named]):
        with suppress(GptSimpleError):
            facts = RunRecord.load(run_dir).facts
            if {"config", "origins"} <= facts.keys() and run_dir.has_checkpoints():
                break
    else:
        return spec
    with spec.located_errors():
        return keep_values(spec, facts["config"], facts["origins"])


def keep_values(spec: RunSpec, saved: Mapping[str, Any], explicit: Collection[str] = ()) -> RunSpec:
    """``spec`` with the saved values of fields whose defaults have changed, and a note that names them.

    ``explicit``: the fields that were set when ``saved`` was.
    """
    kept: dict[str, str] = {}
    for _ in ("components", "their fields"):
        now = flatten(spec.config)
        values = {
            key: value
            for key, value in _changed_values(with_legacy_values(saved, spec.config), now).items()
            if key not in explicit and spec.origins.is_default(key)
        }
        kept |= {key: f"{key} {json.dumps(value)} (now {json.dumps(now[key])})" for key, value in values.items()}
        spec = spec.with_defaults(values) if values else spec
    if not kept:
        return spec
    note = f"the run keeps the defaults that it began with: {', '.join(kept.values())}"
    return evolve(spec, notes=[*spec.notes, note])


def _changed_values(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The saved values of fields that are different ``now``.

    If a component has changed, its name alone: the other fields of its section depend on it. A field that is a table
    has no value of its own, and is left out.
    """
    sections = tuple(f"{name}." for name, key in _COMPONENT_KEY.items() if key is None or saved.get(key) == now[key])
    keys = [key for key in now if key in _COMPONENT_KEY.values() or (key.startswith(sections) and key.count(".") == 1)]
    return {key: saved[key] for key in keys if key in saved and saved[key] != now[key]}
