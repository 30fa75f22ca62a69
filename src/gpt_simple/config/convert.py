"""The hooks by which cattrs structures the closed set of types, made of the parsed types.

There is nothing lax about them: a value is taken as it is or refused, and never bent into shape. Text such as
``"null"`` stands for null where null is allowed, because TOML has no other way to say it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import NoneType
from typing import Any

from cattrs import (
    AttributeValidationNote,
    BaseConverter,
    BaseValidationError,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
)
from cattrs.cols import homogenous_tuple_structure_factory
from cattrs.gen import mapping_structure_factory

from gpt_simple.config.frozen import FrozenDict
from gpt_simple.config.origin import join
from gpt_simple.config.types import FieldType, Mismatch, fields_of, parse_type

Hook = Callable[[Any, Any], Any]


class MissingKey(ValueError):
    """A key without a default that was not given."""


class UnknownKey(ValueError):
    """A key that its table, of the class ``table``, does not have."""

    def __init__(self, table: type) -> None:
        self.table = table
        super().__init__("unknown key")


@cache
def converter() -> BaseConverter:
    """The converter of the closed set of types."""
    strict = BaseConverter()
    strict.register_structure_hook_factory(lambda _: True, lambda annotation: _hook(parse_type(annotation)))
    for scalar in (bool, int, float, str, NoneType):  # cattrs has hooks of its own for these, which come first
        strict.register_structure_hook(scalar, _hook(parse_type(scalar)))
    return strict


def errors_of(error: BaseException, path: str) -> Iterator[tuple[str, Exception]]:
    """Every single error in what the converter raised, with the dotted path of the value that it is about."""
    if isinstance(error, ClassValidationError):
        with_names, others = error.group_exceptions()
        for inner, attribute in with_names:
            yield from errors_of(inner, join(path, attribute.name))
        for inner in others:
            yield from errors_of(inner, path)
    elif isinstance(error, IterableValidationError):
        for inner, item in error.group_exceptions()[0]:
            yield from errors_of(inner, join(path, item.index))
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            yield join(path, key), UnknownKey(error.cl)
    elif isinstance(error, Exception):
        yield path, error


def _hook(type_: FieldType) -> Hook:
    match type_.kind:
        case "list":
            return _checked(type_, (list, tuple), homogenous_tuple_structure_factory(type_.annotation, converter()))
        case "mapping":
            return _checked(type_, Mapping, mapping_structure_factory(type_.annotation, converter(), FrozenDict))
        case "record":
            return _checked(type_, Mapping, _record_hook(type_.annotation))
        case "union":
            return _union_hook(type_)
        case "scalar" | "choice":
            return lambda value, _: type_.convert(value)


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
                    values[name] = structure(value[name], spec.annotation)
                elif spec.is_required:
                    raise MissingKey(f"this key must be given; expected {spec.type.description}")
            except (Mismatch, MissingKey, BaseValidationError) as error:
                error.__notes__ = [AttributeValidationNote(f"at {name}", name, spec.annotation)]
                errors.append(error)
        if unknown := {str(key) for key in value if key not in specs}:
            errors.append(ForbiddenExtraKeysError(None, cls, unknown))
        if errors:
            raise ClassValidationError(cls.__name__, errors, cls)
        return cls(**values)

    return record


def _union_hook(type_: FieldType) -> Hook:
    alternatives = [_hook(member) for member in type_.members if member.annotation is not NoneType]
    nulls = (None, *type_.null_words) if type_.null_words else ()

    def union(value: Any, annotation: Any) -> Any:
        if (value is None or isinstance(value, str)) and value in nulls:
            return None
        for hook in alternatives:
            try:
                return hook(value, annotation)
            except Mismatch:
                continue
        raise Mismatch(type_, value)

    return union
