"""YAML and JSON text -> values and the line of every key.

PyYAML only scans and composes here. The meaning of a plain scalar is YAML 1.2's core schema, as JSON and most
other tools have it: ``1e-4`` is a number, ``no`` is text. ``1_000_000`` is a number too, as in YAML 1.1 and
TOML.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from gpt_simple.config.origin import join
from gpt_simple.config.parsed import Parsed, SyntaxMistake

_HALF_CHARACTER = "half of a surrogate pair is not a character"
_TAG = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """A loader that knows only the core schema's scalars."""

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


def parse_yaml(text: str) -> Parsed:
    """Values and lines of a YAML document; a repeated key is a mistake."""
    try:
        root = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = "; ".join(part for part in (error.context, error.problem) if part)
        hint = "this looks like TOML, whose files end in .toml" if _LIKE_TOML.search(text) else ""
        return _broken(mark.line + 1 if mark else 0, mark.column + 1 if mark else 0, problem, hint)
    except yaml.reader.ReaderError as error:
        return _broken(
            text.count("\n", 0, error.position) + 1,
            0,
            f"the character U+{error.character:04X} is not allowed",
        )
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        return _broken(0, 0, str(error))
    if root is None:
        return Parsed({}, {})
    walk = _Walk()
    values = walk.value(root, "")
    if not isinstance(values, dict):
        if values is not None:
            walk.mistakes.append(SyntaxMistake(1, 1, "expected sections such as `training:` with keys below them"))
        values = {}
    return Parsed(values, walk.lines, tuple(walk.mistakes))


def parse_json(text: str) -> Parsed:
    """Values and lines of a JSON document; a repeated key is a mistake."""
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return _broken(error.lineno, error.colno, error.msg[:1].lower() + error.msg[1:])
    except UnicodeEncodeError:
        return _broken(0, 0, _HALF_CHARACTER)
    except ValueError as error:
        return _broken(0, 0, str(error))
    # JSON is YAML but for tabs between tokens; inside a JSON string there are none. Only the lines are taken
    # from it.
    places = parse_yaml(text.replace("\t", " "))
    if not isinstance(values, dict):
        return _broken(1, 1, 'expected an object of sections such as {"training": {...}}')
    return Parsed(values, places.lines, places.mistakes if places.values is not None else ())


def _broken(line: int, column: int, message: str, hint: str = "") -> Parsed:
    return Parsed(None, {}, (SyntaxMistake(line, column, message, hint=hint),))


class _Walk:
    """Turns nodes into values, noting lines and mistakes on the way."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.mistakes: list[SyntaxMistake] = []
        self._open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: str) -> Any:
        if node in self._open:
            self._mistake(node, f"{path} contains itself")
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node, path)
            return self._scalar(node)
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
            here = join(path, key)
            if key == "<<":
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
            self._mistake(node, str(error))
            return None
        self._mistake(node, f"the tag {node.tag} is not supported", hint="write a plain value")
        return None

    def _text(self, node: yaml.Node) -> str:
        text: str = node.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._mistake(node, _HALF_CHARACTER)
        return text

    def _mistake(self, node: yaml.Node, message: str, key: str = "", hint: str = "") -> None:
        mark = node.start_mark
        self.mistakes.append(SyntaxMistake(mark.line + 1, mark.column + 1, message, key, hint))
