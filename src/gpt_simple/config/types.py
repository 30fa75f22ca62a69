"""The closed set of types that a configuration field may have.

``bool``, ``int``, ``float``, ``str``, ``Path``, ``Literal``, an ``Enum`` of texts or integers, ``X | None`` and other
unions of these, ``tuple[T, ...]``, ``tuple[X, Y]``, ``Mapping[str, T]`` and nested attrs classes. :func:`parse_type`
reads an annotation once into a :class:`FieldType`. Conversion, error messages, help, completion, JSON Schema and the
check of plugins follow from it, so a field is written once, in its section.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from annotated_types import Ge, Gt, Le, Lt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple._files import user_path
from gpt_simple.config.frozen import is_key, json_value
from gpt_simple.config.mistakes import closest, show
from gpt_simple.errors import PluginError

Bound = Ge | Gt | Le | Lt

NULL_WORDS = ("null", "none")
"""Text that means null where null is allowed, because TOML has no other way to say it."""

_BOUNDS: Mapping[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Ge: (">=", "minimum", operator.ge),
    Gt: (">", "exclusiveMinimum", operator.gt),
    Le: ("<=", "maximum", operator.le),
    Lt: ("<", "exclusiveMaximum", operator.lt),
}
"""Sign, keyword in JSON Schema and comparison of each bound."""

_SCALARS: Mapping[Any, tuple[str, str, str, str]] = {
    bool: ("a boolean (true or false)", "booleans", "boolean", "boolean"),
    int: ("an integer", "integers", "integer", "integer"),
    float: ("a number", "numbers", "number", "number"),
    str: ("text", "text", "text", "string"),
    Path: ("a path", "paths", "path", "string"),
    NoneType: ("null", "nulls", "null", "null"),
}
"""Description, plural, label and type in JSON Schema of each type with a single value."""

SUPPORTED_TYPES = (
    "supported are bool, int, float, str, Path, Literal, an Enum of texts or integers, X | None, tuple[X, ...],"
    " tuple[X, Y], Mapping[str, X] and frozen attrs classes"
)


class Mismatch(ValueError):
    """A value of another type than its field.

    ``discreet`` is the message without the value.
    """

    def __init__(self, type_: FieldType, value: Any, expected: str = "") -> None:
        wanted = f"expected {expected or type_.description}"
        self.value = value
        self.discreet = f"{wanted}, got something else, which is not shown"
        self.type = type_
        super().__init__(f"{wanted}, got {show(value)}")

    def hint(self, typed: str) -> str:
        """How the value was probably meant; empty if there is no guess. ``typed`` is its text in the file, if known."""
        return _hint(self.type, self.value, typed)


class UnsupportedType(TypeError):
    """An annotation outside the closed set. ``part`` is the part of it that is not supported."""

    def __init__(self, part: Any) -> None:
        self.part = part
        super().__init__(f"a configuration cannot hold {part!r}")


@frozen(eq=False)
class FieldType:
    """The type of a field.

    ``description`` reads ``an integer >= 1 or null``, ``label`` reads ``integer >= 1 | null``. ``choices`` are the
    texts that completion offers. ``parts`` are the item of a list or of a mapping, the items of a row (a list of fixed
    length), and the alternatives of a union.
    """

    kind: Literal["scalar", "choice", "list", "row", "mapping", "record", "union"]
    annotation: Any
    description: str
    label: str
    plural: str = "values"
    choices: tuple[str, ...] = ()
    bounds: tuple[Bound, ...] = ()
    parts: tuple[FieldType, ...] = ()

    @property
    def members(self) -> tuple[FieldType, ...]:
        """The alternatives of a union, null included; of another type, itself."""
        return self.parts if self.kind == "union" else (self,)

    @property
    def tables(self) -> tuple[type, ...]:
        """The attrs classes that the type contains."""
        return (self.annotation,) if self.kind == "record" else tuple(t for part in self.parts for t in part.tables)

    @property
    def null_words(self) -> tuple[str, ...]:
        """Text that means null. In a choice of words "none" is not: a precision of "none" is meant as "no"."""
        if not self.accepts(NoneType):
            return ()
        return NULL_WORDS[:1] if any(member.kind == "choice" for member in self.members) else NULL_WORDS

    def accepts(self, annotation: Any) -> bool:
        """Whether a type, such as ``str``, is among the alternatives."""
        return any(member.annotation is annotation for member in self.members)

    def in_bounds(self, value: Any) -> bool:
        """Whether a number is within all bounds."""
        return all(_BOUNDS[type(bound)][2](value, _limit(bound)) for bound in self.bounds)

    def json_schema(self) -> dict[str, Any]:
        """The JSON Schema (draft-07) of its values."""
        match self.kind:
            case "choice":
                return {"enum": list(choices_of(self.annotation))}
            case "list":
                return {"type": "array", "items": self.parts[0].json_schema()}
            case "row":
                count = len(self.parts)
                items = [part.json_schema() for part in self.parts]
                return {"type": "array", "items": items, "minItems": count, "maxItems": count}
            case "mapping":
                return {"type": "object", "additionalProperties": self.parts[0].json_schema()}
            case "union":
                schemas = [part.json_schema() for part in self.parts if part.annotation is not NoneType]
                return {"anyOf": [*schemas, *([{"enum": [None, *self.null_words]}] if self.null_words else [])]}
            case "record":
                specs = fields_of(self.annotation)
                required = [spec.name for spec in specs if spec.is_required]
                return {
                    "type": "object",
                    "description": summary(self.annotation),
                    "properties": {spec.name: spec.json_schema() for spec in specs},
                    "additionalProperties": False,
                } | ({"required": required} if required else {})
            case "scalar":
                limits = {_BOUNDS[type(bound)][1]: _limit(bound) for bound in self.bounds}
                return {"type": _SCALARS[self.annotation][3], **limits}


@frozen
class IsPath:
    """Marks a field whose texts are paths: a leading ``~`` is the home directory, and an empty text is an error."""

    def resolved(self, value: Any) -> Any:
        """The value of the field with its paths resolved. Raises ValueError."""
        if isinstance(value, tuple):
            return tuple(map(user_path, value))
        return user_path(value) if isinstance(value, str) else value


@frozen
class LegacyDefault:
    """The value of a new field in runs that began before the field existed, which keeps their behaviour.

    ``Annotated[bool, Doc("..."), LegacyDefault(False)] = True``. Only a field whose default changes what a run does
    needs it. Without it such runs get the default.
    """

    value: Any


@frozen
class FieldSpec:
    """A field as its section declares it.

    ``default`` is ``attrs.NOTHING`` if the field must be given. ``legacy_default`` is the value in a run that began
    before the field existed.
    """

    name: str
    annotation: Any
    type: FieldType
    doc: str
    default: Any
    legacy_default: Any
    path: IsPath | None = None

    @property
    def is_required(self) -> bool:
        """Whether the field must be given."""
        return self.default is attrs.NOTHING

    def json_schema(self) -> dict[str, Any]:
        """The JSON Schema of its values, with help and default."""
        schema = self.type.json_schema()
        if self.doc:
            schema["description"] = self.doc
        return schema if self.is_required else schema | {"default": json_value(self.default)}


@cache
def fields_of(cls: type) -> tuple[FieldSpec, ...]:
    """The fields of an attrs class, in order. A type outside the closed set is a PluginError."""
    hints = get_type_hints(cls, include_extras=True)
    specs = []
    for attribute in attrs.fields(cls):
        if not (attribute.init and is_key(attribute)):
            continue
        annotation = hints[attribute.name]
        if problem := key_problem(attribute):
            raise PluginError(f"{cls.__module__}.{cls.__qualname__}.{attribute.name} {problem}")
        try:
            type_ = parse_type(annotation)
        except UnsupportedType as error:
            where = f"{cls.__module__}.{cls.__qualname__}.{attribute.name}"
            raise PluginError(f"{where}: {error}", hint=SUPPORTED_TYPES) from None
        for table in type_.tables:
            fields_of(table)
        default = default_of(cls, attribute)
        extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
        doc = next((extra.documentation for extra in extras if isinstance(extra, Doc)), "")
        legacy = next((extra.value for extra in extras if isinstance(extra, LegacyDefault)), default)
        path = next((extra for extra in extras if isinstance(extra, IsPath)), None)
        specs.append(FieldSpec(attribute.name, annotation, type_, doc, default, legacy, path))
    return tuple(specs)


def key_problem(attribute: attrs.Attribute[Any]) -> str:
    """Why a field cannot be a key of a configuration, which has one name for a value; empty if it can be one."""
    if attribute.alias == attribute.name:
        return ""
    if attribute.name.lstrip("_") == attribute.alias:
        return f"begins with an underscore, which no key of a configuration does: call it {attribute.alias}"
    return f"has the alias {attribute.alias!r}: a key and its field have one name"


def default_of(cls: type, attribute: attrs.Attribute[Any]) -> Any:
    """The default of a field of ``cls``, ``attrs.NOTHING`` if it must be given.

    One that is computed from other fields (``@field.default``) is that of an instance with all defaults. Raises
    PluginError if it cannot be computed.
    """
    default: Any = attribute.default
    if not isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default
    try:
        return getattr(cls(), attribute.name) if default.takes_self else default.factory()
    except Exception as error:
        where = f"{cls.__module__}.{cls.__qualname__}.{attribute.name}"
        raise PluginError(f"{where} has a default that cannot be computed: {type(error).__name__}: {error}") from error


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values that a configuration gives for a ``Literal`` or an ``Enum``."""
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum)
    return tuple(member.value for member in annotation) if is_enum else get_args(annotation)


def parse_type(annotation: Any, bounds: tuple[Bound, ...] = ()) -> FieldType:
    """The type that an annotation describes; UnsupportedType if it is outside the closed set.

    ``bounds``, and those of ``Annotated[T, bounds, Doc(...)]``, apply only to numbers, also to those of a union.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return parse_type(arguments[0], tuple(extra for extra in arguments[1:] if isinstance(extra, Ge | Gt | Le | Lt)))
    if origin in (Union, UnionType):
        parts = tuple(parse_type(argument, bounds) for argument in arguments)
        *words, last = (part.description for part in parts)
        choices = tuple(choice for part in parts for choice in part.choices)
        label = " | ".join(part.label for part in parts)
        return FieldType("union", annotation, f"{', '.join(words)} or {last}", label, choices=choices, parts=parts)
    if origin is Literal or _is_choice(annotation):
        words = [f'"{choice}"' for choice in choices_of(annotation)]
        choices = tuple(str(choice) for choice in choices_of(annotation))
        description = f"one of {', '.join(words)}" if len(words) > 1 else words[0]
        return FieldType("choice", annotation, description, " | ".join(words), choices=choices)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        item = parse_type(arguments[0])
        return FieldType("list", annotation, f"a list of {item.plural}", f"list of {item.plural}", parts=(item,))
    if origin is tuple and arguments and Ellipsis not in arguments:
        parts = tuple(parse_type(argument) for argument in arguments)
        alike = len({part.annotation for part in parts}) == 1
        what = parts[0].plural if alike else f"values ({', '.join(part.description for part in parts)})"
        return FieldType(
            "row", annotation, f"a list of {len(parts)} {what}", f"list of {len(parts)} {what}", parts=parts
        )
    if origin is Mapping and arguments[:1] == (str,):
        item = parse_type(arguments[1])
        return FieldType("mapping", annotation, f"a table of {item.plural}", f"table of {item.plural}", parts=(item,))
    if isinstance(annotation, type) and attrs.has(annotation):
        return FieldType("record", annotation, "a table", "table", "tables")
    if origin is not None or annotation not in _SCALARS:
        raise UnsupportedType(annotation)
    description, plural, label, _ = _SCALARS[annotation]
    if annotation not in (int, float):
        bounds = ()
    limits = [f"{_BOUNDS[type(bound)][0]} {_limit(bound)}" for bound in bounds]
    return FieldType(
        "scalar",
        annotation,
        f"{description} {' and '.join(limits)}".rstrip(),
        f"{label} {', '.join(limits)}".rstrip(),
        plural,
        ("true", "false") if annotation is bool else (),
        bounds,
    )


def _is_choice(annotation: Any) -> bool:
    """Whether it is an Enum that a configuration file can choose from."""
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum) and len(annotation) > 0
    return is_enum and all(isinstance(member.value, str) or type(member.value) is int for member in annotation)


def summary(cls: type) -> str:
    """The first line of a class's docstring, without markup."""
    return (cls.__doc__ or "").strip().partition("\n")[0].replace("``", "")


def _limit(bound: Bound) -> Any:
    return getattr(bound, type(bound).__name__.lower())


def _hint(type_: FieldType, value: Any, typed: str) -> str:
    is_list = any(member.kind == "list" and member.parts[0].annotation is str for member in type_.members)
    if not isinstance(value, str):
        word = typed or (show(value) if isinstance(value, bool | int | float) else "")
        if not word or not (type_.accepts(str) or is_list):
            return ""
        return f'write "{word}"' if type_.accepts(str) else f'write ["{word}"]'
    for member in type_.members:
        if member.kind == "choice" and (choice := closest(value, member.choices)):
            return f'did you mean "{choice}"?'
    word = value.strip().lower()
    if type_.accepts(bool) and word in ("true", "yes", "on", "false", "no", "off"):
        return f"write {'true' if word in ('true', 'yes', 'on') else 'false'}"
    if type_.accepts(NoneType) and word in ("none", "null", "nil", "~", ""):
        return 'write null (in TOML "null", or leave the key out)'
    if (type_.accepts(int) or type_.accepts(float)) and (number := _number(word)) is not None:
        return f"write {number}"
    if is_list:
        return f"write [{show(value)}]"
    return ""


def _number(text: str) -> str | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return f"{value:g}" if math.isfinite(value) and float(f"{value:g}") == value else None
