"""JSON documents that come back from a disk: whatever was done to them, the error is an OSError or a ValueError.

A document is compared with a shape before it is used, so code that follows needs no further checks. A shape is

- a type, ``str`` for example; ``object`` fits everything, and ``float`` also fits integers
- a ``range``, which holds numbers from its start to below its stop
- a tuple: one of these shapes; ``None`` in it is null
- ``[shape]``: a list of such values
- ``{"key": shape, "other?": shape}``: a mapping, which may lack ``other`` and may have more; ``{...: shape}``: one with
  such values under any keys
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COUNT = range(2**63)
"""Steps, tokens, samples, and other counts."""
TIME = range(10**11)
"""Seconds, also since the epoch; datetime holds them all."""
PID = range(1, 2**31)

NESTED = "it is nested too deeply"
_DEEPEST = 100
"""Nesting that no document of this program has. Python's own functions fail at some more."""


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for whatever is none, also for one that is nested without end."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(NESTED) from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > _DEEPEST and _is_deeper(value, _DEEPEST):  # type: ignore[arg-type]
        raise ValueError(NESTED)
    return value


def read(path: Path, shape: object = object) -> Any:
    """The value of a JSON file, which has this shape. Raises OSError or ValueError."""
    value = parse(path.read_bytes())
    check(value, shape)
    return value


def fits(value: Any, shape: object) -> bool:
    """Whether a value has this shape."""
    return _misfit(value, shape, "") is None


def check(value: Any, shape: object) -> None:
    """Raise ValueError, which names the key and what was expected, unless the value has this shape."""
    if (found := _misfit(value, shape, "")) is not None:
        where, wanted = found
        raise ValueError(f"{where or 'it'}: expected {_words(wanted)}")


def _misfit(value: Any, shape: Any, where: str) -> tuple[str, object] | None:
    """The key of the first part that does not have its shape, and this shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return where, shape
        for key, inner in shape.items():
            parts: Iterable[tuple[str, Any]]
            if key is ...:
                parts = value.items()
            elif (name := key.removesuffix("?")) in value:
                parts = [(name, value[name])]
            elif name is not key:
                continue
            else:
                return f"{where}.{key}".lstrip("."), inner
            for name, part in parts:
                if found := _misfit(part, inner, f"{where}.{name}".lstrip(".")):
                    return found
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return where, shape
        items = ((f"{where}[{index}]", item) for index, item in enumerate(value))
        return next((found for place, item in items if (found := _misfit(item, shape[0], place))), None)
    if isinstance(shape, tuple):
        fit = any(_misfit(value, each, where) is None for each in shape)
    elif isinstance(shape, range):
        fit = type(value) in (int, float) and shape.start <= value < shape.stop
    elif shape is int or shape is float:
        fit = type(value) is int or type(value) is shape
    else:
        fit = value is None if shape is None else isinstance(value, shape)
    return None if fit else (where, shape)


def _words(shape: object) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, range):
        return f"a number from {shape.start} to below {shape.stop}"
    if isinstance(shape, dict):
        return "an object"
    if isinstance(shape, list):
        return "a list"
    words = {None: "null", str: "text", bool: "true or false", int: "an integer", float: "a number"}
    return words.get(shape, "another value")  # type: ignore[call-overload, no-any-return]


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inner)
