"""What every file format is read into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen


@frozen
class SyntaxMistake:
    """Something that is wrong with the text itself. Line and column count from 1; 0 is unknown."""

    line: int
    column: int
    message: str
    key: str = ""
    hint: str = ""


@frozen
class Parsed:
    """A document: its values (None if it could not be read to the end) and dotted path -> line."""

    values: dict[str, Any] | None
    lines: Mapping[str, int]
    mistakes: tuple[SyntaxMistake, ...] = ()
