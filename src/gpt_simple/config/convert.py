"""Converts a raw value to the type of its field. A value is taken as it is or refused, never bent into shape.

cattrs structures the values with hooks that are made of the parsed types, because its own are lax. Text such as
``"null"`` stands for null where null is allowed, because TOML has no other way to write it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import attrs
from cattrs import (
    AttributeValidationNote,
    BaseConverter,
    BaseValidationError,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.cols import homogenous_tuple_structure_factory
from cattrs.gen import mapping_structure_factory

from gpt_simple._files import user_path
from gpt_simple.config.frozen import FrozenDict
from gpt_simple.config.origin import join
from gpt_simple.config.types import FieldType, Mismatch, choices_of, fields_of, parse_type

Errors = list[tuple[str, Exception]]
Hook = Callable[[Any, Any], Any]

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
    try:
        return _converter().structure(value, annotation), []
    except (BaseValidationError, ValueError) as error:
        errors = list(_errors_of(error, path))
    if attrs.has(annotation) and isinstance(value, Mapping):
        wrong = {where for where, _ in errors}
        kept = {key: item for key, item in value.items() if not _is_in(join(path, str(key)), wrong)}
        with suppress(BaseValidationError, ValueError):
            return _converter().structure(kept, annotation), errors
    return None, errors


def _is_in(place: str, wrong: set[str]) -> bool:
    return any(where == place or where.startswith((f"{place}.", f"{place}[")) for where in wrong)


@cache
def _converter() -> BaseConverter:
    converter = BaseConverter()
    converter.register_structure_hook_factory(lambda _: True, lambda annotation: _hook(parse_type(annotation)))
    for scalar in (bool, int, float, str, Path, NoneType):  # cattrs has hooks of its own for these, which come first
        converter.register_structure_hook(scalar, _hook(parse_type(scalar)))
    return converter


def _errors_of(error: BaseException, path: str) -> Iterator[tuple[str, Exception]]:
    if isinstance(error, ClassValidationError):
        with_names, others = error.group_exceptions()
        for inner, attribute in with_names:
            yield from _errors_of(inner, join(path, attribute.name))
        for inner in others:
            yield from _errors_of(inner, path)
    elif isinstance(error, IterableValidationError):
        for inner, item in error.group_exceptions()[0]:
            yield from _errors_of(inner, join(path, item.index))
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            yield join(path, key), UnknownKey(error.cl)
    elif isinstance(error, Exception):
        yield path, error


def _hook(type_: FieldType) -> Hook:
    match type_.kind:
        case "list":
            return _checked(type_, (list, tuple), homogenous_tuple_structure_factory(type_.annotation, _converter()))
        case "row":
            return _checked(type_, (list, tuple), _row_hook(type_))
        case "mapping":
            return _checked(type_, Mapping, mapping_structure_factory(type_.annotation, _converter(), FrozenDict))
        case "record":
            return _checked(type_, Mapping, _record_hook(type_.annotation))
        case "union":
            return _union_hook(type_)
        case "scalar" | "choice":
            return lambda value, _: _exactly(type_, value)


def _checked(type_: FieldType, shape: Any, hook: Hook) -> Hook:
    """The hook for values that have the shape it takes for granted."""

    def checked(value: Any, annotation: Any) -> Any:
        if not isinstance(value, shape):
            raise Mismatch(type_, value)
        return hook(value, annotation)

    return checked


def _record_hook(cls: type) -> Hook:
    """Like the function that cattrs would generate, without the milliseconds in which Python compiles that one."""
    specs = {spec.name: (spec, _hook(spec.type)) for spec in fields_of(cls)}

    def record(value: Any, _: Any) -> Any:
        values: dict[str, Any] = {}
        errors: list[Exception] = []
        for name, (spec, structure) in specs.items():
            try:
                if name in value:
                    structured = structure(value[name], spec.annotation)
                    values[name] = structured if spec.path is None else spec.path.resolved(structured)
                elif spec.is_required:
                    raise ValueError(f"this key must be given; expected {spec.type.description}")
            except (BaseValidationError, ValueError) as error:
                error.__notes__ = [AttributeValidationNote(f"at {name}", name, spec.annotation)]
                errors.append(error)
        if unknown := {str(key) for key in value if key not in specs}:
            errors.append(ForbiddenExtraKeysError(None, cls, unknown))
        if errors:
            raise ClassValidationError(cls.__name__, errors, cls)
        try:
            return cls(**values)
        except Exception as error:  # of a validator
            raise ClassValidationError(cls.__name__, [error], cls) from None

    return record


def _row_hook(type_: FieldType) -> Hook:
    hooks = [_hook(part) for part in type_.parts]

    def row(value: Any, _: Any) -> Any:
        if len(value) != len(hooks):
            raise Mismatch(type_, value)
        items, errors = [], []
        for index, (item, hook, part) in enumerate(zip(value, hooks, type_.parts, strict=True)):
            try:
                items.append(hook(item, part.annotation))
            except (BaseValidationError, ValueError) as error:
                error.__notes__ = [IterableValidationNote(f"at {index}", index, part.annotation)]
                errors.append(error)
        if errors:
            raise IterableValidationError("row", errors, type_.annotation)
        return tuple(items)

    return row


def _union_hook(type_: FieldType) -> Hook:
    hooks = [_hook(member) for member in type_.members]

    def union(value: Any, annotation: Any) -> Any:
        if isinstance(value, str) and value in type_.null_words:
            return None
        for hook in hooks:
            try:
                return hook(value, annotation)
            except Mismatch:  # not suppress, which from Python 3.12 on also takes those of the items of a list
                continue
        raise Mismatch(type_, value)

    return union


def _exactly(type_: FieldType, value: Any) -> Any:
    """An integral float becomes an integer and an integer becomes a number. Nothing else is converted."""
    kind = type_.annotation
    if type_.kind == "choice":
        given = value.value if isinstance(value, Enum) else value
        for choice in choices_of(kind):
            if type(choice) is type(given) and choice == given:
                return kind(choice) if isinstance(kind, type) else choice
        raise Mismatch(type_, value)
    if kind is Path:
        if not isinstance(value, str | Path) or _UNREADABLE.search(str(value)):
            raise Mismatch(type_, value)
        return Path(user_path(str(value)))
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
