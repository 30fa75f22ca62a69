"""YAML and JSON text -> values and the line of every key.

PyYAML only scans and composes here. The meaning of a plain scalar is YAML 1.2's core schema, as in JSON and most other
tools: ``1e-4`` is a number, ``no`` is text. ``1_000_000`` is a number too, as in YAML 1.1 and TOML.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import yaml

from gpt_simple._documents import NESTED, parse
from gpt_simple.config.mistakes import file_error
from gpt_simple.config.origin import Mistake, Origin, join
from gpt_simple.config.parsed import UNREADABLE, Parsed
from gpt_simple.errors import ConfigError

_HALF_CHARACTER = "half of a surrogate pair is not a character"
_TAG = "tag:yaml.org,2002:"
_MOST_VALUES = 100_000
"""Values of a file with its aliases written out: ten lines of aliases of aliases are more than memory holds."""


class _CoreLoader(yaml.SafeLoader):
    """A loader with only the scalars of the core schema."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}


_LIKE_TOML = re.compile(r"^\[[\w.]+\]\s*\n\s*[\w.]+ *=", re.MULTILINE)

for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+(?:_\d+)*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.\d+|\d+(?:_\d+)*(?:\.\d*)?)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _CoreLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z", re.ASCII), _first)


def parse_yaml(text: str, file: str) -> Parsed:
    """Values and lines of a YAML document; a repeated key is a mistake. A text that is no YAML is a ConfigError."""
    try:
        root = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        message = "; ".join(part for part in (error.context, error.problem) if part)
        hint = "this looks like TOML, whose files end in .toml" if _LIKE_TOML.search(text) else ""
        raise file_error(file, message, line=line, column=column, hint=hint) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise file_error(file, f"the character U+{error.character:04X} is not allowed", line=line) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise file_error(file, str(error)) from None
    except RecursionError:
        raise file_error(file, NESTED) from None
    walk = _Walk(file)
    values = walk.value(root, "") if root is not None else None
    if values is None:
        values = {}
    elif not isinstance(values, dict):
        raise file_error(file, "expected sections such as `training:` with keys below them", line=1, column=1)
    return Parsed(values, walk.lines, walk.mistakes, walk.typed)


def parse_json(text: str, file: str) -> Parsed:
    """Values and lines of a JSON document; a repeated key is a mistake. A text that is no JSON is a ConfigError."""
    try:
        values = parse(text)
        json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:]
        raise file_error(file, message, line=error.lineno, column=error.colno) from None
    except UnicodeEncodeError:
        raise file_error(file, _HALF_CHARACTER) from None
    except ValueError as error:
        raise file_error(file, str(error)) from None
    if not isinstance(values, dict):
        message = 'expected an object of sections such as {"training": {...}}'
        raise file_error(file, message, line=1, column=1)
    # Only lines and repeated keys are taken from YAML, which does not accept quite all that JSON accepts: tabs between
    # tokens, which never occur inside a JSON string, and some characters.
    with suppress(ConfigError):
        as_yaml = parse_yaml(text.replace("\t", " "), file)
        return Parsed(values, as_yaml.lines, as_yaml.mistakes, as_yaml.typed)
    return Parsed(values, {})


class _Walk:
    """Turns nodes into values, and collects lines and mistakes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[str, int] = {}
        self.typed: dict[str, str] = {}
        self.mistakes: list[Mistake] = []
        self._open: list[yaml.Node] = []
        self._count = 0

    def value(self, node: yaml.Node, path: str) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            line = node.start_mark.line + 1
            raise file_error(self.file, f"more than {_MOST_VALUES:,} values, aliases written out", line=line)
        if node in self._open:
            return self._mistake(node, f"{path} contains itself")
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node, path)
            value = self._scalar(node)
            if isinstance(value, bool | int | float):
                self.typed[path] = node.value
            return value
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._mistake(key_node, "a key must be plain text")
                continue
            # As written, and not as a number or boolean: a bucket may be called 2024 or no.
            key = self._text(key_node)
            if key is UNREADABLE:
                continue
            here = join(path, key)
            if key == "<<" and key_node.style is None:
                self._mistake(key_node, "merging with << is no part of YAML 1.2", hint="write the keys out")
                continue
            if key in result:
                first = self.lines[here]
                self._mistake(key_node, f"given twice, first on line {first}", here, "keep one of the two")
                continue
            self.lines[here] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, here)
        return result

    def _sequence(self, node: yaml.SequenceNode, path: str) -> list[Any]:
        result = []
        for index, item in enumerate(node.value):
            self.lines[join(path, index)] = item.start_mark.line + 1
            result.append(self.value(item, join(path, index)))
        return result

    def _scalar(self, node: yaml.Node) -> Any:
        text: str = node.value
        try:
            match node.tag.removeprefix(_TAG):
                case "str":
                    return self._text(node)
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
                    return int(text[2:] if base != 10 else text, base)
                case "float":
                    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError as error:
            return self._mistake(node, str(error))
        return self._mistake(node, f"the tag {node.tag} is not supported", hint="write a plain value")

    def _text(self, node: yaml.Node) -> Any:
        """The text of a scalar; two escapes that are the halves of one character, as in JSON, are that character."""
        try:
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            return self._mistake(node, _HALF_CHARACTER)

    def _mistake(self, node: yaml.Node, message: str, key: str = "", hint: str = "") -> Any:
        origin = Origin.in_file(self.file, node.start_mark.line + 1, node.start_mark.column + 1)
        self.mistakes.append(origin.mistake(key, message, hint))
        return UNREADABLE
