"""Converts a raw value to the type of its field. A value is taken as it is or refused, never bent into shape.

Text such as ``"null"`` stands for null where null is allowed, because TOML has no other way to write it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_args

from gpt_simple.config.frozen import FrozenDict
from gpt_simple.config.origin import join
from gpt_simple.config.types import FieldType, Mismatch, fields_of, parse_type

Errors = list[tuple[str, Exception]]

_TEXT = parse_type(str)
_UNREADABLE = re.compile("[\0\ud800-\udfff]")
_LARGEST = 2**63 - 1


class UnknownKey(ValueError):
    """A key that its table, of the class ``table``, does not have."""

    def __init__(self, table: type) -> None:
        self.table = table
        super().__init__("unknown key")


def convert(annotation: Any, value: Any, path: str = "") -> tuple[Any, Errors]:
    """The converted value, and every error with the dotted path of the value that it is about.

    A table is made without the keys that are in error. The result is None if nothing can be made.
    """
    errors: Errors = []
    return _convert(parse_type(annotation), value, path, errors), errors


def _convert(type_: FieldType, value: Any, path: str, errors: Errors) -> Any:
    try:
        return _exactly(type_, value, path, errors)
    except Mismatch as error:
        errors.append((path, error))
        return None


def _exactly(type_: FieldType, value: Any, path: str, errors: Errors) -> Any:
    """Raise Mismatch if the value itself is of another type; errors inside it are added to ``errors``."""
    match type_.kind:
        case "list" if isinstance(value, list | tuple):
            (item_type,) = type_.parts
            return tuple(_convert(item_type, item, join(path, index), errors) for index, item in enumerate(value))
        case "mapping" if isinstance(value, Mapping):
            (item_type,) = type_.parts
            items = ((key, join(path, str(key)), item) for key, item in value.items())
            return FrozenDict(
                (_convert(_TEXT, key, place, errors), _convert(item_type, item, place, errors))
                for key, place, item in items
            )
        case "record" if isinstance(value, Mapping):
            return _record(type_.annotation, value, path, errors)
        case "union":
            if isinstance(value, str) and value in type_.null_words:
                return None
            for member in type_.members:
                with suppress(Mismatch):
                    return _exactly(member, value, path, errors)
        case "choice":
            for choice in get_args(type_.annotation):
                if type(choice) is type(value) and choice == value:
                    return choice
        case "scalar":
            return _scalar(type_, value)
    raise Mismatch(type_, value)


def _scalar(type_: FieldType, value: Any) -> Any:
    """An integral float becomes an integer and an integer becomes a number. Nothing else is converted."""
    kind = type_.annotation
    if kind is str and isinstance(value, str) and _UNREADABLE.search(value):
        raise Mismatch(type_, value, "text without null characters and half surrogates")
    if kind not in (int, float) or isinstance(value, bool):
        fits = isinstance(value, kind) and kind is not int
    elif kind is float and isinstance(value, float):
        fits = math.isfinite(value)
    else:
        fits = isinstance(value, int | float) and value % 1 == 0 and abs(value) <= _LARGEST
    if not (fits and type_.in_bounds(value)):
        raise Mismatch(type_, value)
    return kind(value) if kind in (int, float) else value


def _record(cls: type, value: Mapping[Any, Any], path: str, errors: Errors) -> Any:
    before = len(errors)
    values: dict[str, Any] = {}
    specs = fields_of(cls)
    for spec in specs:
        known = len(errors)
        if spec.name in value:
            item = _convert(spec.type, value[spec.name], join(path, spec.name), errors)
            if len(errors) == known:
                values[spec.name] = item
        elif spec.is_required:
            message = f"this key must be given; expected {spec.type.description}"
            errors.append((join(path, spec.name), ValueError(message)))
    unknown = {str(key) for key in value} - {spec.name for spec in specs}
    errors += [(join(path, key), UnknownKey(cls)) for key in sorted(unknown)]
    try:
        return cls(**values)
    except Exception as error:  # of a validator, or because a required key is in error
        if len(errors) == before:
            errors.append((path, error))
        return None
