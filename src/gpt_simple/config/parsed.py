"""The result of reading a file, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from gpt_simple.config.origin import Mistake

UNREADABLE: Any = object()
"""Stands for a value whose text is in error, so that its key is checked all the same."""


@frozen
class Parsed:
    """A document: its values, dotted path -> line, and the errors in its text that did not end the reading."""

    values: dict[str, Any]
    lines: Mapping[str, int]
    mistakes: Sequence[Mistake] = ()
