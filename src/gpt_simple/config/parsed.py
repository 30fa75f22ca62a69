"""The result of reading a file, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from gpt_simple.config.origin import Mistake

UNREADABLE: Any = object()
"""Stands for a value whose text is in error, so that its key is checked all the same."""


@frozen
class Parsed:
    """A document: its values, and the errors in its text that did not end the reading.

    ``lines`` and ``typed`` are dotted path -> line, and the text of a value that is a number, a date or a boolean.
    """

    values: dict[str, Any]
    lines: Mapping[str, int]
    mistakes: Sequence[Mistake] = ()
    typed: Mapping[str, str] = field(factory=dict)
    notes: Sequence[str] = ()
