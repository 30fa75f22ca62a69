"""Shared mappings that cannot be changed, and plain copies of configured values."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import attrs


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed; ``json.dumps`` and ``**`` accept it. Copies of it can be changed."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("this mapping is shared and cannot be changed: change a copy of it, as dict(...) makes one")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


def frozen_dict(values: Mapping[str, Any]) -> FrozenDict:
    """A deep copy of ``values`` that cannot be changed, with lists as tuples."""
    return FrozenDict((key, _frozen(value)) for key, value in values.items())


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozen_dict(value)
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def is_key(attribute: attrs.Attribute[Any]) -> bool:
    """Whether an attribute is a key of its table; if not, it holds further keys of that table."""
    return bool(attribute.metadata.get("is_key", True))


def json_value(value: Any) -> Any:
    """A configuration, or a part of one, as JSON values in the shape of a file."""
    if attrs.has(type(value)):
        values: dict[str, Any] = {}
        for attribute in attrs.fields(type(value)):
            item = json_value(getattr(value, attribute.name))
            values |= {attribute.name: item} if is_key(attribute) else item
        return values
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value.value if isinstance(value, Enum) else value
