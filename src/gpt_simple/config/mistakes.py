"""Mistakes are collected and reported together, in the order of the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen

from gpt_simple.config.origin import Origin
from gpt_simple.errors import ConfigError, Problem

_RANK = {"file": 0, "python": 1, "env": 2, "cli": 3, "default": 4}
_LONGEST_VALUE = 60


@frozen
class Mistake:
    """What is wrong with a key, and where that was set. ``unknown``: the key itself is, whatever its value."""

    origin: Origin
    key: str
    message: str
    hint: str = ""
    unknown: bool = False

    @property
    def problem(self) -> Problem:
        """For the error; each part is one line of printable text."""
        location = None if self.origin.kind == "default" else self.origin.where
        key, message, hint = (printable(part.replace("\n", " ")) for part in (self.key, self.message, self.hint))
        return Problem(location and printable(location), key, message, hint)


def config_error(mistakes: Iterable[Mistake]) -> ConfigError:
    """All mistakes as one error, sorted by location."""
    ordered = sorted(mistakes, key=lambda m: (_RANK[m.origin.kind], m.origin.line, m.origin.where, m.key))
    return ConfigError(*dict.fromkeys(m.problem for m in ordered))


def printable(text: str) -> str:
    """The text with control characters and half surrogates as escapes: they would act on a terminal or break it."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def show(value: Any) -> str:
    """A value as the user would write it, short enough for one line."""
    if isinstance(value, Mapping):
        return "a table"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return short(text)


def short(text: str) -> str:
    """Text of the user's, cut where a message would only get longer."""
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def closest(word: str, words: Iterable[str], *, cutoff: float = 0.65) -> str | None:
    """The word that was probably meant: spelt alike, a part of it, or its initials (lr, batch_size)."""
    import difflib

    word = word.lower()
    by_lower = {candidate.lower(): candidate for candidate in words}
    if match := difflib.get_close_matches(word, by_lower, 1, cutoff):
        return by_lower[match[0]]
    for lower, candidate in by_lower.items():
        if (len(word) > 3 and word in lower) or word == "".join(part[:1] for part in lower.split("_")):
            return candidate
    return None
