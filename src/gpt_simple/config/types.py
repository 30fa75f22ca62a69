"""The closed set of types that a configuration field may have, and how each is called in words.

``bool``, ``int``, ``float``, ``str``, ``Literal``, ``X | None`` and other unions of these, ``tuple[T, ...]``,
``Mapping[str, T]`` and nested attrs classes. Help texts, error messages, JSON Schema and the checks all read
a field through :func:`fields_of`, so a field is written once, in its section.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from annotated_types import Ge, Gt, Le, Lt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple.errors import PluginError

Bound = Ge | Gt | Le | Lt

_WORDS: dict[Any, tuple[str, str, str]] = {
    bool: ("a boolean (true or false)", "booleans", "boolean"),
    int: ("an integer", "integers", "integer"),
    float: ("a number", "numbers", "number"),
    str: ("text", "text", "text"),
    NoneType: ("null", "nulls", "null"),
}
_SUPPORTED = (
    "use bool, int, float, str, Literal, tuple[T, ...], Mapping[str, T], an attrs class, or a union such as X | None"
)


@frozen
class LegacyDefault:
    """The value that a new field has in runs that began without it: the one that keeps what they do.

    ``Annotated[bool, Doc("..."), LegacyDefault(False)] = True``. Only a field whose default changes what a run does
    needs the mark: without it the default is the value.
    """

    value: Any


@frozen
class FieldSpec:
    """A field as its section declares it.

    ``type`` is the ``annotation`` without help and bounds; ``default`` is ``attrs.NOTHING`` if the field must be given.
    ``legacy_default`` is the value in a run that began before the field existed.
    """

    name: str
    annotation: Any
    type: Any
    bounds: tuple[Bound, ...]
    doc: str
    default: Any
    legacy_default: Any

    @property
    def expected(self) -> str:
        """What a value must be, in words: ``an integer >= 1 or null``."""
        return describe(self.type, self.bounds)

    @property
    def label(self) -> str:
        """What a value must be, as a label: ``integer >= 1 | null``."""
        return label(self.type, self.bounds)


@cache
def fields_of(cls: type) -> tuple[FieldSpec, ...]:
    """The fields of an attrs class, in order; one of a type outside the closed set is a PluginError."""
    hints = get_type_hints(cls, include_extras=True)
    specs = []
    for attribute in attrs.fields(cls):
        if not (attribute.init and attribute.metadata.get("is_key", True)):
            continue
        bare, bounds, doc = unwrap(hints[attribute.name])
        if (unknown := _outside(bare)) is not None:
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__}.{attribute.name}: a configuration cannot hold {unknown!r}",
                hint=_SUPPORTED,
            )
        default = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        marks = (mark.value for mark in get_args(hints[attribute.name]) if isinstance(mark, LegacyDefault))
        legacy = next(marks, default)
        specs.append(FieldSpec(attribute.name, hints[attribute.name], bare, bounds, doc, default, legacy))
    return tuple(specs)


def unwrap(annotation: Any) -> tuple[Any, tuple[Bound, ...], str]:
    """``Annotated[T, bounds, Doc(...)]`` -> (T, bounds, help)."""
    if get_origin(annotation) is not Annotated:
        return annotation, (), ""
    bare, *extras = get_args(annotation)
    bounds = tuple(extra for extra in extras if isinstance(extra, Ge | Gt | Le | Lt))
    doc = next((extra.documentation for extra in extras if isinstance(extra, Doc)), "")
    return bare, bounds, doc


def members(type_: Any) -> tuple[Any, ...]:
    """The alternatives of a union, ``NoneType`` included; a plain type is its own only one."""
    return get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)


def is_nullable(type_: Any) -> bool:
    """Whether null is a value of the type."""
    return NoneType in members(type_)


def describe(type_: Any, bounds: tuple[Bound, ...] = ()) -> str:
    """The type in words, with its bounds on the numbers in it."""
    limits = " and ".join(_limit(bound) for bound in bounds)
    words = []
    for member in members(type_):
        if get_origin(member) is Literal:
            words.append("one of " + ", ".join(f'"{choice}"' for choice in get_args(member)))
        elif get_origin(member) is tuple:
            words.append(f"a list of {_plural(get_args(member)[0])}")
        elif get_origin(member) is Mapping or attrs.has(member):
            words.append("a table" if attrs.has(member) else f"a table of {_plural(get_args(member)[1])}")
        elif member in (int, float) and limits:
            words.append(f"{_WORDS[member][0]} {limits}")
        else:
            words.append(_WORDS[member][0])
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def label(type_: Any, bounds: tuple[Bound, ...] = ()) -> str:
    """The type as a label: ``integer >= 1 | null``."""
    limits = " " * bool(bounds) + ", ".join(_limit(bound) for bound in bounds)
    parts = []
    for member in members(type_):
        if get_origin(member) is Literal:
            parts += [f'"{choice}"' for choice in get_args(member)]
        elif member in _WORDS:
            parts.append(_WORDS[member][2] + (limits if member in (int, float) else ""))
        else:
            parts.append(describe(member).removeprefix("a "))
    return " | ".join(parts)


def violates(value: Any, bounds: tuple[Bound, ...]) -> bool:
    """Whether a number lies outside the bounds. Other values have none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not all(_holds(value, bound) for bound in bounds)


def _holds(value: Any, bound: Bound) -> bool:
    match bound:
        case Ge(limit):
            return bool(value >= limit)
        case Gt(limit):
            return bool(value > limit)
        case Le(limit):
            return bool(value <= limit)
        case Lt(limit):
            return bool(value < limit)


def _limit(bound: Bound) -> str:
    match bound:
        case Ge(limit):
            return f">= {limit}"
        case Gt(limit):
            return f"> {limit}"
        case Le(limit):
            return f"<= {limit}"
        case Lt(limit):
            return f"< {limit}"


def _plural(type_: Any) -> str:
    return _WORDS[type_][1] if type_ in _WORDS else "tables" if attrs.has(type_) else "values"


def _outside(type_: Any) -> Any:
    """The part of a type that is not in the closed set, or None."""
    for member in members(type_):
        origin, arguments = get_origin(member), get_args(member)
        if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
            inner = _outside(arguments[0])
        elif origin is Mapping and arguments[0] is str:
            inner = _outside(arguments[1])
        elif origin is Literal or member in _WORDS:
            inner = None
        elif isinstance(member, type) and attrs.has(member):
            fields_of(member)
            inner = None
        else:
            inner = member
        if inner is not None:
            return inner
    return None
