"""Reads a configuration's sources and lays them over each other: defaults < file < environment < command line.

Nothing is checked against the schema here. :mod:`gpt_simple.config.structure` does that, and reports the mistakes that
were collected on the way. In between, the raw values say which model and which plugins the configuration asks for, and
so which classes its tables are structured into.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
from attrs import field, frozen

from gpt_simple._names import ENV_PREFIX
from gpt_simple.config.frozen import is_key
from gpt_simple.config.legacy import translate
from gpt_simple.config.mistakes import config_error, file_error
from gpt_simple.config.origin import Mistake, Origin, Origins, join
from gpt_simple.config.parsed import UNREADABLE, Parsed
from gpt_simple.config.redact import HIDDEN, is_secret, secrets_in, without
from gpt_simple.config.schema import Config
from gpt_simple.config.types import NULL_WORDS

T = TypeVar("T")

OVERRIDE = re.compile(r"--([A-Za-z_][^=.\s]*\.[^=\s]*)(?:=(.*))?", re.DOTALL)
"""``--section.key`` or ``--section.key=value``; also with dashes for underscores."""
_ALMOST_ENV = re.compile(rf"GPT_SIMPLE_({'|'.join(a.name.upper() for a in attrs.fields(Config))})_+(\w+)")
"""A variable that is meant for this program, but lacks an underscore."""
_ASSIGNED = re.compile(r"(-*)([A-Za-z_][^=\s]*)=(.*)", re.DOTALL)
"""``--option=value`` and ``NAME=value``."""
_PYTHON = Origin("python", "train(...)")
_MOST_PARTS = 50
"""Parts of a dotted key. Python's own functions fail at some hundreds."""
_UNSET = (None, *NULL_WORDS, UNREADABLE)


@frozen
class RawConfig:
    """The values of all sources, merged, before they are checked.

    ``texts`` keeps the text of values from the environment and the command line, for fields that accept text. ``notes``
    are remarks for the user. ``mistakes`` are reported when the configuration is structured.
    """

    values: dict[str, Any]
    origins: Origins
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    texts: Mapping[str, str] = field(factory=dict)

    def get(self, path: str) -> Any:
        """The value at a dotted path, None if no source sets it."""
        value: Any = self.values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def as_text(self, path: str) -> str | None:
        """The text of an option or a variable that reads as a number or a date; None for any other value."""
        return None if isinstance(self.get(path), str | list) else self.texts.get(path)

    def is_set(self, path: str) -> bool:
        """Whether a source sets the value at a dotted path to anything but null."""
        return self.get(path) not in _UNSET


def read(
    path: str | Path | None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    environ: Mapping[str, str] | None = None,
    sections: Mapping[str, object] | None = None,
    parsed: Parsed | None = None,
) -> RawConfig:
    """Merge a file, ``sections`` given in Python, ``GPT_SIMPLE__SECTION__KEY`` variables and overrides.

    ``overrides`` are (dotted key, text); the text is read as a TOML value or as JSON, else it is taken as it is. A
    section given in Python (an instance of its class, or a mapping) replaces the file's whole section. ``environ``
    defaults to the process's environment. ``parsed`` is the content of ``path`` if that has been read. A file that is
    missing or that cannot be read to its end is a ConfigError.
    """
    layers = _Layers()
    if path is not None:
        file = Path(os.path.expanduser(path))
        layers.add_file(str(file), parsed or _parse(file))
    for name, section in (sections or {}).items():
        layers.add_section(name, section)
    layers.add_environment(os.environ if environ is None else environ)
    for key, text in overrides:
        layers.add_text(key, text, Origin("cli", f"--{key}"))
    return RawConfig(layers.values, Origins(layers.origins), tuple(layers.notes), tuple(layers.mistakes), layers.texts)


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Take every ``--section.key value`` and ``--section.key=value`` out of a command line.

    Returns the overrides as (dotted key, text) and the other arguments in their order. Arguments after a bare ``--``
    are not overrides. An override without a value is a ConfigError.
    """
    overrides: list[tuple[str, str]] = []
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            return overrides, [*rest, argument, *remaining]
        if not (found := OVERRIDE.fullmatch(argument)):
            rest.append(argument)
            continue
        key, text = field_key(found[1]), found[2]
        if text is None:
            if not remaining or remaining[0].startswith("--"):
                hint = f"write --{found[1]} VALUE or --{found[1]}=VALUE"
                raise config_error([Origin("cli", f"--{key}").mistake(key, "a value is missing", hint)])
            text = remaining.pop(0)
        overrides.append((key, text))
    return overrides, rest


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line, of this program or of another, with the values of its secrets hidden."""
    shown: list[str] = []
    key = ""
    for word in arguments:
        if found := _ASSIGNED.fullmatch(word):
            shown.append(f"{found[1]}{found[2]}={redacted_text(found[2], found[3])}")
        else:
            shown.append(redacted_text(key, word))
        key = word.lstrip("-") if word.startswith("-") and not found else ""
    return shown


def redacted_text(key: str, text: str) -> str:
    """The text of an option, hidden if the key is a secret's, else without the secrets of the table that it gives."""
    key = key.replace("-", "_")
    return HIDDEN if is_secret(key) and text else without(text, secrets_in(_literal(text), key))


def field_key(option: str) -> str:
    """The dotted key of ``--section.key``. Fields may be written with dashes; keys of a mapping stay as typed."""
    parts = option.split(".")
    depth = 3 if parts[0] == "plugins" else 2
    return ".".join([*(part.replace("-", "_") for part in parts[:depth]), *parts[depth:]])


def sections_of(config: Config) -> dict[str, object]:
    """A configuration built in Python, as the ``sections`` of :func:`read`."""
    return {attribute.name: getattr(config, attribute.name) for attribute in attrs.fields(Config)}


class _Layers:
    """The values read so far. Each layer overrides the earlier ones."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, Origin] = {}
        self.texts: dict[str, str] = {}
        self.notes: list[str] = []
        self.mistakes: list[Mistake] = []

    def add_file(self, file: str, parsed: Parsed) -> None:
        self.mistakes += parsed.mistakes
        self.notes += parsed.notes
        self.origins |= {
            key: Origin.in_file(file, line, typed=parsed.typed.get(key, "")) for key, line in parsed.lines.items()
        }
        for name, section in self._translated(parsed.values).items():
            # `plugins:` with nothing below it is an empty table.
            self.values[name] = {} if section is None else section

    def add_section(self, name: str, section: object) -> None:
        values = {name: plain(section)}
        self.origins = _outside(name, self.origins)
        self.values[name] = {}
        self._merge(self.values, self._translated(values), "", _PYTHON)

    def add_environment(self, environ: Mapping[str, str]) -> None:
        for variable, text in sorted(environ.items()):
            origin = Origin("env", f"${variable}")
            if variable.startswith(ENV_PREFIX):
                key = variable.removeprefix(ENV_PREFIX).lower().split("__")
                if all(key):
                    self.add_text(".".join(key), text, origin)
                else:
                    self.mistakes.append(origin.mistake("", f"expected a name like {ENV_PREFIX}TRAINING__MAX_STEPS"))
            elif meant := _ALMOST_ENV.fullmatch(variable):
                self.notes.append(f"${variable} is not read; did you mean ${ENV_PREFIX}{meant[1]}__{meant[2]}?")

    def add_text(self, key: str, text: str, origin: Origin) -> None:
        if key.count(".") > _MOST_PARTS:
            place = Origin(origin.kind, f"{origin.where[:60]}...")
            raise config_error([place.mistake("", f"the key has more than {_MOST_PARTS} parts")])
        value = _literal(text)
        self.texts = _outside(key, self.texts)
        if not isinstance(value, dict):
            self.texts[key] = text
        for part in reversed(key.split(".")):
            value = {part: value}
        self._merge(self.values, self._translated(value, origin), "", origin)

    def _translated(self, values: dict[str, Any], origin: Origin | None = None) -> dict[str, Any]:
        values, renamed = translate(values)
        for change in renamed:
            source = origin or self.origins.get(change.old, _PYTHON)
            self.notes.append(f"{source.where}: {change.note}")
            self.origins |= {new: source for new in change.new if origin is None}
        return values

    def _merge(self, target: dict[str, Any], values: Mapping[str, Any], table: str, origin: Origin) -> None:
        """Merge tables key by key, and replace everything else."""
        for key, value in values.items():
            path = join(table, key)
            is_table = isinstance(value, Mapping)
            if not (is_table and isinstance(target.get(key), dict)):
                overridden = self.origins.get(path)
                self.origins = _outside(path, self.origins) | {path: attrs.evolve(origin, overrides=overridden)}
                target[key] = {} if is_table else value
            if is_table:
                self._merge(target[key], value, path, origin)


def _outside(path: str, values: dict[str, T]) -> dict[str, T]:
    """What ``values`` (dotted path -> anything) has neither at ``path`` nor inside it."""
    return {key: value for key, value in values.items() if not _is_inside(key, path)}


def _is_inside(path: str, outer: str) -> bool:
    return path.startswith(outer) and path[len(outer) : len(outer) + 1] in ("", ".", "[")


def _parse(path: Path) -> Parsed:
    """Read one file by its suffix."""
    file = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise file_error(file, f"byte {error.start} is not UTF-8", hint="save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise file_error(file, f"the configuration cannot be read ({reason})") from None
    try:
        match path.suffix.lower():
            case ".toml":
                from gpt_simple.config.parse_toml import parse_toml

                return parse_toml(text, file)
            case ".yaml" | ".yml":
                from gpt_simple.config.parse_yaml import parse_yaml

                return parse_yaml(text, file)
            case ".json":
                from gpt_simple.config.parse_yaml import parse_json

                return parse_json(text, file)
    except RecursionError:
        raise file_error(file, "tables or lists are nested too deeply") from None
    raise file_error(file, "a configuration is a .toml, .yaml, .yml or .json file")


def _literal(text: str) -> Any:
    """The value of a text that is a TOML value, or a list or table of JSON; else the text itself."""
    import tomli

    try:
        document = tomli.loads(f"value = {text}")
        return document["value"] if len(document) == 1 else text
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(text) if text.lstrip()[:1] in ("[", "{") else text
    except (ValueError, RecursionError):
        return text


def plain(value: Any) -> Any:
    """A value given in Python as a file would have it. Of an instance of an attrs class, defaults are left out."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and not getattr(value, "ndim", 1):
        return value.item()  # a number of numpy, which this module does not import
    if not attrs.has(type(value)):
        return value
    # A component's own class keeps all its fields: the built-in class may have another default.
    complete = not type(value).__module__.startswith("gpt_simple.")
    values: dict[str, Any] = {}
    for attribute in attrs.fields(type(value)):
        item, default = getattr(value, attribute.name), attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        if not is_key(attribute):
            values |= plain(item)
        elif complete or item != default or type(item) is not type(default):
            values[attribute.name] = plain(item)
    return values
