"""Checks a raw configuration against the schema and makes the frozen one. All mistakes are one error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from gpt_simple._names import PROGRAM
from gpt_simple.config.convert import UnknownKey, convert
from gpt_simple.config.cross_checks import conflicts
from gpt_simple.config.legacy import OLD_VALUES
from gpt_simple.config.load import RawConfig
from gpt_simple.config.mistakes import closest, config_error
from gpt_simple.config.origin import Mistake
from gpt_simple.config.parsed import UNREADABLE
from gpt_simple.config.redact import is_secret
from gpt_simple.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PluginsConfig,
    TrainingConfig,
)
from gpt_simple.config.types import Mismatch, fields_of

SECTIONS: Mapping[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
}
_MANY_KEYS = 8
SWITCHES = tuple(spec.name for spec in fields_of(PluginsConfig))


def structure(
    raw: RawConfig,
    *,
    sections: Mapping[str, type] | None = None,
    plugin_configs: Mapping[str, type] | None = None,
) -> Config:
    """The configuration of a run, or one ConfigError with a line for every mistake.

    ``sections`` replaces the class of a section, for a component that brings its own. ``plugin_configs`` maps plugin
    name to config class: ``[plugins.NAME]`` becomes an instance of it, with its defaults if there is no such table.
    Tables of other plugins stay as they are.
    """
    return _Structuring(raw, {**SECTIONS, **(sections or {})}, plugin_configs or {}).run()


class _Structuring:
    def __init__(self, raw: RawConfig, sections: Mapping[str, type], plugin_configs: Mapping[str, type]) -> None:
        self.raw = raw
        self.sections = sections
        self.plugin_configs = plugin_configs
        self.mistakes: list[Mistake] = [*raw.mistakes]
        self.wrong: set[str] = set()

    def run(self) -> Config:
        values = self.raw.values
        for name in values:
            if name not in self.sections and name != "plugins":
                self._report(name, *self._unknown_section(name, values[name]))
        parts: dict[str, Any] = {
            name: self._section(name, values.get(name), cls) for name, cls in self.sections.items()
        }
        parts["plugins"] = self._plugins(values.get("plugins"))
        for paths, problem in conflicts(parts["model"], parts["data"], parts["training"], parts["plugins"]):
            if self.wrong.isdisjoint(paths):
                places = ", ".join(map(self.raw.origins.place, paths))
                first = min(map(self.raw.origins.of, paths), key=lambda origin: origin.order)
                self.mistakes.append((first, problem._replace(location=places)))
        if self.mistakes:
            raise config_error(self.mistakes)
        return Config(**parts)

    def _section(self, path: str, value: Any, cls: type) -> Any:
        """An instance of the section's class without the keys that are in error; None if there can be none."""
        if value is None:
            value = {}
        if isinstance(value, Mapping):
            value = self._with_texts(path, value, cls)
        made, errors = convert(cls, value, path)
        for place, error in errors:
            if isinstance(error, UnknownKey):
                self._report_unknown(place, error.table)
            elif not isinstance(error, Mismatch):
                self._report(place, str(error) or type(error).__name__)
            elif error.value is UNREADABLE:
                self.wrong.add(place)  # the reader of the file has reported it
            elif is_secret(place):
                self._report(place, error.discreet)
            else:
                self._report(place, str(error), error.hint(self.raw.origins.of(place).typed))
        return made

    def _plugins(self, value: Any) -> PluginsConfig | None:
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            self._section("plugins", value, PluginsConfig)
            return None
        switches = self._section("plugins", {key: value[key] for key in SWITCHES if key in value}, PluginsConfig)
        tables: dict[str, Any] = {}
        for name, table in value.items():
            if name in SWITCHES or name in self.plugin_configs:
                continue
            if not (table is None or table is UNREADABLE or isinstance(table, Mapping)):
                self._report_unknown(f"plugins.{name}", PluginsConfig)
            tables[name] = table or {}
        for name, cls in self.plugin_configs.items():
            tables[name] = self._section(f"plugins.{name}", value.get(name), cls)
        return attrs.evolve(switches, tables=tables) if switches is not None else None

    def _with_texts(self, path: str, value: Mapping[str, Any], cls: type) -> dict[str, Any]:
        """Put the text of an option or a variable that reads as a number or a date where a field accepts text."""
        texts = {s.name: self.raw.as_text(f"{path}.{s.name}") for s in fields_of(cls) if s.type.accepts(str)}
        return {**value, **{name: text for name, text in texts.items() if text is not None}}

    def _unknown_section(self, name: str, value: Any) -> tuple[str, str]:
        """Message and hint."""
        names = [*self.sections, "plugins"]
        if meant := closest(name, names):
            if meant in self.sections:
                self._doubt([f"{meant}.{spec.name}" for spec in fields_of(self.sections[meant])])
            return "unknown section", f"did you mean [{meant}]?"
        if not isinstance(value, Mapping) and (home := self._fields_named(name) or self._fields_like(name)):
            return "unknown key", self._did_you_mean(home)
        return "unknown section", f"expected one of {', '.join(names)}"

    def _report_unknown(self, path: str, cls: type) -> None:
        """Report a key that belongs to another section, or is misspelt, or both."""
        table, _, key = path.rpartition(".")
        names = [spec.name for spec in fields_of(cls)]
        near = closest(key, names)
        message = "unknown key"
        if path in OLD_VALUES:
            message, hint = OLD_VALUES[path]
        elif meant := self._fields_named(key) or ([f"{table}.{near}"] if near else []) or self._fields_like(key):
            hint = self._did_you_mean(meant)
        elif "epoch" in key:
            hint = "a run is as long as training.max_steps says"
        elif cls is PluginsConfig:
            message, hint = f"expected a table [{path}] or one of {', '.join(names)}", ""
        elif not names:
            hint = "nothing can be set here"
        elif len(names) > _MANY_KEYS:
            hint = f"all keys are in `{PROGRAM} run --help`"
        else:
            hint = f"expected one of {', '.join(names)}"
        self._report(path, message, hint)

    @cached_property
    def _fields(self) -> dict[str, list[str]]:
        """Name -> the paths of the fields of that name in the sections, or else in the tables of plugins."""
        fields = _paths_by_name({**self.sections, "plugins": PluginsConfig})
        of_plugins = _paths_by_name({f"plugins.{name}": cls for name, cls in self.plugin_configs.items()})
        return fields | {name: paths for name, paths in of_plugins.items() if name not in fields}

    def _did_you_mean(self, fields: Sequence[str]) -> str:
        self._doubt(fields)
        return f"did you mean {' or '.join(fields)}?"

    def _doubt(self, fields: Sequence[str]) -> None:
        """Report no conflict with the default of a field whose value probably stands under another name."""
        self.wrong.update(path for path in fields if self.raw.origins.is_default(path))

    def _fields_named(self, key: str) -> Sequence[str]:
        return self._fields.get(key, ())

    def _fields_like(self, key: str) -> Sequence[str]:
        """The cutoff is high: what a field of another section sets is something else."""
        return self._fields_named(closest(key, self._fields, cutoff=0.8) or "")

    def _report(self, path: str, message: str, hint: str = "") -> None:
        self.wrong.add(path)
        self.mistakes.append(self.raw.origins.nearest(path).mistake(path, message, hint))


def _paths_by_name(tables: Mapping[str, type]) -> dict[str, list[str]]:
    paths: dict[str, list[str]] = {}
    for table, cls in tables.items():
        for spec in fields_of(cls):
            paths.setdefault(spec.name, []).append(f"{table}.{spec.name}")
    return paths
