"""cattrs with nothing lax about it: a value is taken as it is or refused, and never bent into shape.

An integral float is an integer and an integer is a number; nothing else is converted. Text such as ``"null"``
stands for null where null is allowed, because TOML has no other way to say it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

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

from gpt_simple.config.frozen import FrozenDict
from gpt_simple.config.mistakes import closest, show
from gpt_simple.config.origin import join
from gpt_simple.config.types import Bound, describe, fields_of, members, unwrap, violates

Hook = Callable[[Any, Any], Any]

_LARGEST = 2**63 - 1


class Mismatch(ValueError):
    """A value that is not what its field wants.

    ``value`` is that value, ``discreet`` the message without it, ``hint`` how it was probably meant.
    """

    def __init__(self, type_: Any, value: Any, expected: str | None = None) -> None:
        self.value = value
        wanted = f"expected {expected or describe(type_)}"
        self.discreet = f"{wanted}, got something else, which is not shown"
        self.hint = _hint(type_, value)
        super().__init__(f"{wanted}, got {show(value)}")


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
    for type_, hook in ((bool, _bool), (int, _int), (float, _float), (str, _str), (NoneType, _null)):
        strict.register_structure_hook(type_, hook)
    strict.register_structure_hook_factory(attrs.has, _table_hook)
    strict.register_structure_hook_factory(_has_origin(Mapping), _mapping_hook)
    strict.register_structure_hook_factory(_has_origin(tuple), _tuple_hook)
    strict.register_structure_hook_factory(_has_origin(Literal), _literal_hook)
    strict.register_structure_hook_factory(lambda t: len(members(t)) > 1, _union_hook)
    strict.register_structure_hook_factory(_has_origin(Annotated), _bounded_hook)
    return strict


def _has_origin(origin: Any) -> Callable[[Any], bool]:
    return lambda type_: get_origin(type_) is origin


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


def _bool(value: Any, _: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise Mismatch(bool, value)


def _int(value: Any, _: Any) -> int:
    if not isinstance(value, bool):
        if isinstance(value, int) and abs(value) <= _LARGEST:
            return value
        if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST:
            return int(value)
    raise Mismatch(int, value)


def _float(value: Any, _: Any) -> float:
    if not isinstance(value, bool):
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, int) and abs(value) <= _LARGEST:
            return float(value)
    raise Mismatch(float, value)


def _str(value: Any, _: Any) -> str:
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise Mismatch(str, value, "text without null characters and half surrogates")
        return value
    raise Mismatch(str, value)


def _null(value: Any, _: Any) -> None:
    if value is not None:
        raise Mismatch(NoneType, value)


def _table_hook(cls: Any) -> Hook:
    specs = {spec.name: (spec, _bounded(spec.type, spec.bounds)) for spec in fields_of(cls)}

    def table(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Mismatch(cls, value)
        values: dict[str, Any] = {}
        errors: list[Exception] = []
        for name, (spec, structure) in specs.items():
            try:
                if name in value:
                    values[name] = structure(value[name], spec.type)
                elif spec.default is attrs.NOTHING:
                    raise MissingKey(f"this key must be given; expected {spec.expected}")
            except (Mismatch, MissingKey, BaseValidationError) as error:
                errors.append(_at(error, AttributeValidationNote(f"at {name}", name, spec.type)))
        if unknown := {str(key) for key in value if key not in specs}:
            errors.append(ForbiddenExtraKeysError(None, cls, unknown))
        if errors:
            raise ClassValidationError(cls.__name__, errors, cls)
        return cls(**values)

    return table


def _mapping_hook(type_: Any) -> Hook:
    strict = converter()
    item_type = get_args(type_)[1]
    item = strict.get_structure_hook(item_type)

    def mapping(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Mismatch(type_, value)
        return FrozenDict(_each(value.items(), item, item_type, type_))

    return mapping


def _tuple_hook(type_: Any) -> Hook:
    strict = converter()
    item_type = get_args(type_)[0]
    item = strict.get_structure_hook(item_type)

    def items(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise Mismatch(type_, value)
        return tuple(result for _, result in _each(enumerate(value), item, item_type, type_))

    return items


def _each(pairs: Any, item: Hook, item_type: Any, type_: Any) -> list[tuple[Any, Any]]:
    """Structure every item; all errors come together."""
    results, errors = [], []
    for key, value in pairs:
        try:
            results.append((key, item(value, item_type)))
        except (Mismatch, BaseValidationError) as error:
            errors.append(_at(error, IterableValidationNote(f"at {key}", key, item_type)))
    if errors:
        raise IterableValidationError("items", errors, type_)
    return results


def _at(error: Exception, note: str) -> Exception:
    """The error with the note by which cattrs tells where it happened."""
    error.__notes__ = [note]
    return error


def _literal_hook(type_: Any) -> Hook:
    choices = {(type(choice), choice): choice for choice in get_args(type_)}

    def literal(value: Any, _: Any) -> Any:
        try:
            return choices[type(value), value]
        except (KeyError, TypeError):
            raise Mismatch(type_, value) from None

    return literal


def _union_hook(type_: Any) -> Hook:
    strict = converter()
    alternatives = [(t, strict.get_structure_hook(t)) for t in members(type_) if t is not NoneType]
    nulls = null_words(type_)

    def union(value: Any, _: Any) -> Any:
        if (value is None and nulls) or (isinstance(value, str) and value in nulls):
            return None
        for member, hook in alternatives:
            try:
                return hook(value, member)
            except Mismatch:
                continue
        raise Mismatch(type_, value)

    return union


def null_words(type_: Any) -> tuple[str, ...]:
    """Text that means null.

    In a choice of words "none" is left out, because somebody who writes a precision of "none" means "no".
    """
    if NoneType not in members(type_):
        return ()
    return ("null",) if any(get_origin(t) is Literal for t in members(type_)) else ("null", "none")


def _bounded_hook(type_: Any) -> Hook:
    bare, bounds, _ = unwrap(type_)
    return _bounded(bare, bounds)


def _bounded(bare: Any, bounds: tuple[Bound, ...]) -> Hook:
    inner = converter().get_structure_hook(bare)

    def bounded(value: Any, _: Any) -> Any:
        try:
            result = inner(value, bare)
        except Mismatch as error:
            if bounds and error.value is value:
                raise Mismatch(bare, value, describe(bare, bounds)) from None
            raise
        if violates(result, bounds):
            raise Mismatch(bare, value, describe(bare, bounds))
        return result

    return bounded


def _hint(type_: Any, value: Any) -> str:
    """How the value was probably meant; empty if there is no guess."""
    accepted = members(type_)
    if isinstance(value, str):
        for member in accepted:
            if get_origin(member) is Literal and (choice := closest(value, map(str, get_args(member)))):
                return f'did you mean "{choice}"?'
        word = value.strip().lower()
        if bool in accepted and word in ("true", "yes", "on", "false", "no", "off"):
            return f"write {'true' if word in ('true', 'yes', 'on') else 'false'}"
        if NoneType in accepted and word in ("none", "null", "nil", "~", ""):
            return 'write null (in TOML "null", or leave the key out)'
        if (int in accepted or float in accepted) and (number := _number(word)) is not None:
            return f"write {number}"
        if any(get_origin(member) is tuple and get_args(member)[0] is str for member in accepted):
            return f"write [{show(value)}]"
    elif str in accepted and isinstance(value, bool | int | float):
        return f'write "{show(value)}"'
    return ""


def _number(text: str) -> str | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return f"{value:g}" if math.isfinite(value) and float(f"{value:g}") == value else None
