"""Mappings that many share and nobody may change, and plain copies of configured values."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, NoReturn

import attrs


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed; ``json.dumps`` and ``**`` take it as any other. Copies of it can be changed."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("everybody gets this mapping, so it cannot be changed: change a copy, as dict(...) makes one")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


def frozen_dict(values: Mapping[str, Any]) -> FrozenDict:
    """``values`` with everything in them, lists as tuples; nothing that is done to ``values`` shows in it."""
    return FrozenDict((key, _frozen(value)) for key, value in values.items())


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozen_dict(value)
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def json_value(value: Any) -> Any:
    """A value of a field, or an instance of a section's class, as JSON values in the shape of a file."""
    if attrs.has(type(value)):
        return {attribute.name: json_value(getattr(value, attribute.name)) for attribute in attrs.fields(type(value))}
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value
