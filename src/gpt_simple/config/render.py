"""Writes a configuration as TOML, YAML or JSON that reads back to the same configuration.

Comments come from the schema, so a written file explains every field and cannot differ from the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from attrs import frozen

from gpt_simple.config.frozen import json_value
from gpt_simple.config.origin import Origins, join
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import SECTIONS
from gpt_simple.config.types import FieldSpec, fields_of, summary

_BARE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WIDEST_ALIGNED = 60
_YAML_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def to_toml(
    config: Config, *, comments: bool = True, origins: Origins | None = None, chosen: Origins | None = None
) -> str:
    """TOML 1.0.

    With ``origins``, the end of each line says where its value was set. With ``chosen``, a value that is a default
    there is written as a comment, so that it stays a default.
    """
    lines = []
    for table in tables(config, comments):
        lines += ["", *([f"# {table.doc}"] if table.doc else []), f"[{_dotted(table.path)}]"]
        # TOML has no null: a value that is unset by default is a comment to fill in.
        texts = [
            ("#" if entry.value is entry.default is None or _is_default(entry, chosen) else "")
            + f"{_key(entry.key)} = {toml_text(entry.value)}"
            for entry in table.entries
        ]
        width = max((len(text) for text in texts if len(text) <= _WIDEST_ALIGNED), default=0)
        for entry, text in zip(table.entries, texts, strict=True):
            if entry.help:
                lines.append(f"# {entry.help}")
            if origins is not None:
                text = f"{text:<{width}}  # {', overrides '.join(origins.chain(entry.path))}"
            lines.append(text)
    return "\n".join(lines[1:]) + "\n"


def to_yaml(config: Config, *, comments: bool = True, chosen: Origins | None = None) -> str:
    """YAML that means the same under the rules of YAML 1.1 and 1.2; ``chosen`` as for TOML."""
    lines = []
    for table in tables(config, comments):
        path = table.path.split(".", 1)
        outer, inner = "  " * (len(path) - 1), "  " * len(path)
        lines += ["", *([f"{outer}# {table.doc}"] if table.doc else [])]
        lines.append(f"{outer}{_key(path[-1])}:" + ("" if table.entries else " {}"))
        for entry in table.entries:
            if entry.help:
                lines.append(f"{inner}# {entry.help}")
            mark = "#" if _is_default(entry, chosen) else ""
            lines.append(f"{inner}{mark}{_key(entry.key)}: {value_text(entry.value)}")
    return "\n".join(lines[1:]) + "\n"


def to_json(config: Config) -> str:
    """JSON, without comments."""
    return json.dumps(json_value(config), indent=2) + "\n"


def field_help(spec: FieldSpec) -> str:
    """The field's help, what it takes and its default, on one line."""
    facts = spec.type.label
    if not spec.is_required:
        facts += f"; default {value_text(json_value(spec.default))}"
    return f"{spec.doc} [{facts}]" if spec.doc else facts


def value_text(value: Any, *, null: str = "null", colon: str = ": ") -> str:
    """A JSON value as a person would type it: YAML flow style, which is JSON but for keys and floats.

    ``null`` and ``colon`` are the words of the format.
    """
    match value:
        case None:
            return null
        case Mapping():
            pairs = (f"{_key(key)}{colon}{value_text(item, null=null, colon=colon)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"
        case list():
            return f"[{', '.join(value_text(item, null=null, colon=colon) for item in value)}]"
        case bool():
            return "true" if value else "false"
        case float():
            return _float(value)
        case int():
            return str(value)
    return _quoted(str(value))


toml_text = partial(value_text, null='"null"', colon=" = ")


@frozen
class _Entry:
    path: str
    key: str
    value: Any
    default: Any
    help: str


@frozen
class _Table:
    path: str
    doc: str
    entries: list[_Entry]


def tables(config: Config, comments: bool) -> Iterator[_Table]:
    """The tables of a configuration as they stand in a file; with help if ``comments``."""
    sections = {name: getattr(config, name) for name in (*SECTIONS, "plugins")}
    for path, table in (sections | {f"plugins.{name}": table for name, table in config.plugins.tables.items()}).items():
        values = json_value(table)
        if isinstance(table, Mapping):
            yield _Table(path, "", [_Entry(join(path, key), key, value, ..., "") for key, value in values.items()])
            continue
        cls: type = type(table)
        entries = [
            _Entry(
                join(path, spec.name), spec.name, values[spec.name], spec.default, field_help(spec) if comments else ""
            )
            for spec in fields_of(cls)
        ]
        doc = summary(cls) if comments else ""
        yield _Table(path, "" if doc.rstrip(".") == f"[{path}]" else doc, entries)


def _is_default(entry: _Entry, chosen: Origins | None) -> bool:
    return chosen is not None and chosen.is_default(entry.path)


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
