"""Writes a configuration as TOML, YAML or JSON that reads back to the same configuration.

Comments come from the schema, so that a written file explains every field and cannot drift from the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen

from gpt_simple.config.frozen import json_value
from gpt_simple.config.origin import Origins, join
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import SECTIONS, SWITCHES
from gpt_simple.config.types import FieldSpec, fields_of, summary

_BARE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WIDEST_ALIGNED = 60
_YAML_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def to_toml(
    config: Config, *, comments: bool = True, origins: Origins | None = None, chosen: Origins | None = None
) -> str:
    """TOML 1.0.

    With ``origins``, the end of each line says where its value came from. With ``chosen``, a value that nobody set
    there is written as a comment, so that it stays a default.
    """
    lines = []
    for table in tables(config):
        lines += ["", *([f"# {table.doc}"] if comments and table.doc else []), f"[{_dotted(table.path)}]"]
        # TOML has no null: what is unset by default is shown as a comment to fill in.
        texts = [
            ("#" if entry.value is entry.default is None or _is_left_out(table, entry, chosen) else "")
            + f"{_key(entry.key)} = {toml_text(entry.value)}"
            for entry in table.entries
        ]
        width = max((len(text) for text in texts if len(text) <= _WIDEST_ALIGNED), default=0)
        for entry, text in zip(table.entries, texts, strict=True):
            if comments and entry.help:
                lines.append(f"# {entry.help}")
            if origins is not None:
                text = f"{text:<{width}}  # {', overrides '.join(origins.chain(join(table.path, entry.key)))}"
            lines.append(text)
    return "\n".join(lines[1:]) + "\n"


def to_yaml(config: Config, *, comments: bool = True, chosen: Origins | None = None) -> str:
    """YAML that means the same under the rules of YAML 1.1 and 1.2; ``chosen`` as for TOML."""
    lines = []
    for table in tables(config):
        path = table.path.split(".", 1)
        outer, inner = "  " * (len(path) - 1), "  " * len(path)
        lines += ["", *([f"{outer}# {table.doc}"] if comments and table.doc else [])]
        lines.append(f"{outer}{_key(path[-1])}:" + ("" if table.entries else " {}"))
        for entry in table.entries:
            if comments and entry.help:
                lines.append(f"{inner}# {entry.help}")
            mark = "#" if _is_left_out(table, entry, chosen) else ""
            lines.append(f"{inner}{mark}{_key(entry.key)}: {value_text(entry.value)}")
    return "\n".join(lines[1:]) + "\n"


def to_json(config: Config) -> str:
    """JSON, without comments."""
    return json.dumps(plain(config), indent=2, ensure_ascii=False) + "\n"


def plain(value: Any) -> Any:
    """A configuration, or a part of one, as JSON values in the shape of a file."""
    if isinstance(value, Config):
        return {name: plain(getattr(value, name)) for name in SECTIONS} | {
            "plugins": {name: plain(getattr(value.plugins, name)) for name in SWITCHES} | plain(value.plugins.tables)
        }
    return json_value(value)


def field_help(spec: FieldSpec) -> str:
    """The field's help, what it takes and its default, on one line."""
    facts = spec.type.label
    if not spec.is_required:
        facts += f"; default {value_text(plain(spec.default))}"
    return f"{spec.doc} [{facts}]" if spec.doc else facts


@frozen
class _Entry:
    key: str
    value: Any
    default: Any
    help: str


@frozen
class _Table:
    path: str
    doc: str
    entries: tuple[_Entry, ...]


def tables(config: Config) -> Iterator[_Table]:
    """The tables of a configuration as they stand in a file, each with its entries."""
    for name in SECTIONS:
        yield _table(name, getattr(config, name))
    yield _table("plugins", config.plugins)
    for name, table in config.plugins.tables.items():
        yield _table(f"plugins.{name}", table)


def _is_left_out(table: _Table, entry: _Entry, chosen: Origins | None) -> bool:
    return chosen is not None and chosen.is_default(join(table.path, entry.key))


def _table(path: str, table: Any) -> _Table:
    if isinstance(table, Mapping):
        return _Table(path, "", tuple(_Entry(key, value, ..., "") for key, value in plain(table).items()))
    cls: type = type(table)
    entries = (_Entry(s.name, plain(getattr(table, s.name)), s.default, field_help(s)) for s in fields_of(cls))
    doc = summary(cls)
    return _Table(path, "" if doc.rstrip(".") == f"[{path}]" else doc, tuple(entries))


def toml_text(value: Any) -> str:
    """A value of :func:`plain` as it is written in TOML."""
    if value is None:
        return '"null"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    return _nested(value, toml_text)


def value_text(value: Any) -> str:
    """A value as a person would type it: YAML flow style, which is JSON but for keys and floats."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {value_text(item)}" for key, item in value.items()) + "}"
    return _nested(value, value_text)


def _nested(value: Any, write: Callable[[Any], str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(write(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    return str(value) if isinstance(value, int) else _quoted(str(value))


def _float(value: float) -> str:
    """The shortest digits that read back, in a form that YAML 1.1 takes for a number too: ``1.0e-5``."""
    mantissa, _, exponent = repr(value).partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent[0]}{exponent[1:].lstrip('0')}"


def _quoted(text: str) -> str:
    escaped = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda found: _printable(found[0]), escaped)


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return f"\\u{ord(character):04X}" if ord(character) < 0x10000 else f"\\U{ord(character):08X}"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) and key.lower() not in _YAML_WORDS else _quoted(key)


def _dotted(path: str) -> str:
    return ".".join(_key(part) for part in path.split(".", 1))
