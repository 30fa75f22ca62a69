"""All mistakes in one error, in the order of the file, and the words and values that messages show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gpt_simple.config.origin import Mistake, Origin
from gpt_simple.errors import ConfigError, Problem

_LONGEST_VALUE = 60


def config_error(mistakes: Iterable[Mistake]) -> ConfigError:
    """All mistakes as one error, sorted by origin. Each part of a problem is one line of printable text."""
    ordered = sorted(mistakes, key=lambda mistake: (mistake[0].order, mistake[1].key))
    problems = (Problem._make(part and printable(part.replace("\n", " ")) for part in found) for _, found in ordered)
    return ConfigError(*dict.fromkeys(problems))


def file_error(file: str, message: str, *, line: int = 0, column: int = 0, hint: str = "") -> ConfigError:
    """The mistake that ends the reading of a file."""
    return config_error([Origin.in_file(file, line, column).mistake("", message, hint)])


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
    """The user's text, cut to what fits into a message."""
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
