"""JSON Schema (draft-07) of the configuration, for editors that complete and check TOML, YAML and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt_simple.config.schema import PluginsConfig
from gpt_simple.config.structure import SECTIONS
from gpt_simple.config.types import parse_type


def json_schema(
    plugin_configs: Mapping[str, type] | None = None, *, sections: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """The schema of a configuration file.

    ``plugin_configs`` maps plugin name to config class. Tables of other plugins are accepted unchecked.
    ``sections`` replaces the class of a section, for a component that brings its own.
    """
    plugins = _table(PluginsConfig)
    plugins["properties"] |= {name: _table(cls) for name, cls in sorted((plugin_configs or {}).items())}
    plugins["additionalProperties"] = {"type": ["object", "null"]}
    tables = {name: _table(cls) for name, cls in {**SECTIONS, **(sections or {})}.items()}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "gpt-simple configuration",
        "type": "object",
        "properties": tables | {"plugins": plugins},
        "additionalProperties": False,
    }


def _table(cls: type) -> dict[str, Any]:
    """The schema of a section. A section without keys is null in YAML, which stands for an empty table."""
    return parse_type(cls).json_schema() | {"type": ["object", "null"]}
