"""JSON Schema (draft-07) of the configuration, for editors that complete and check TOML, YAML and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import attrs
from annotated_types import Ge, Gt, Le, Lt

from gpt_simple.config.convert import null_words
from gpt_simple.config.render import plain, summary
from gpt_simple.config.schema import PluginsConfig
from gpt_simple.config.structure import SECTIONS
from gpt_simple.config.types import Bound, FieldSpec, fields_of, members

_KEYWORD: dict[type, str] = {
    Ge: "minimum",
    Gt: "exclusiveMinimum",
    Le: "maximum",
    Lt: "exclusiveMaximum",
}
_SIMPLE: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema(
    plugin_configs: Mapping[str, type] | None = None, *, sections: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """The schema of a configuration file.

    ``plugin_configs`` maps plugin name to config class; tables of other plugins are let through unchecked.
    ``sections`` replaces the class of a section, for a component that brings its own.
    """
    classes = {**SECTIONS, **(sections or {})}
    plugins = _table(PluginsConfig, nullable=True)
    plugins["properties"] |= {name: _table(cls, nullable=True) for name, cls in sorted((plugin_configs or {}).items())}
    plugins["additionalProperties"] = {"type": ["object", "null"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "gpt-simple configuration",
        "type": "object",
        "properties": {name: _table(cls, nullable=True) for name, cls in classes.items()} | {"plugins": plugins},
        "additionalProperties": False,
    }


def _table(cls: type, *, nullable: bool = False) -> dict[str, Any]:
    """``nullable``: nothing may stand below its name, which is null in YAML and an empty table."""
    specs = fields_of(cls)
    required = [spec.name for spec in specs if spec.default is attrs.NOTHING]
    return {
        "type": ["object", "null"] if nullable else "object",
        "description": summary(cls),
        "properties": {spec.name: _field(spec) for spec in specs},
        "additionalProperties": False,
    } | ({"required": required} if required else {})


def _field(spec: FieldSpec) -> dict[str, Any]:
    schema = _type(spec.type, spec.bounds)
    if spec.doc:
        schema["description"] = spec.doc
    if spec.default is not attrs.NOTHING:
        schema["default"] = plain(spec.default)
    return schema


def _type(type_: Any, bounds: tuple[Bound, ...] = ()) -> dict[str, Any]:
    choices = [_member(member, bounds) for member in members(type_) if member is not NoneType]
    if NoneType in members(type_):
        choices.append({"enum": [None, *null_words(type_)]})
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _member(member: Any, bounds: tuple[Bound, ...]) -> dict[str, Any]:
    origin, arguments = get_origin(member), get_args(member)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    if attrs.has(member):
        return _table(member)
    limits = {_KEYWORD[type(bound)]: _limit(bound) for bound in bounds} if member in (int, float) else {}
    return {"type": _SIMPLE[member], **limits}


def _limit(bound: Bound) -> Any:
    return getattr(bound, type(bound).__name__.lower())
