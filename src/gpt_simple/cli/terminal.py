"""What commands print: text that neither acts on a terminal nor fails on one that is not UTF-8."""

from __future__ import annotations

import io
import re
import sys

_ACTS = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, and those that reorder text. Spaces of other scripts are not among them."""


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text, whatever it holds: names of files, texts of run directories, log lines.

    Control characters become escapes that JSON and TOML read. There may be no stream, after ``>&-``.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        stream.write(shown(text) + "\n" * nl)  # one write: other processes write there too
        stream.flush()


def shown(text: str) -> str:
    """The text with escapes for the characters that act on a terminal."""
    return _ACTS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def write_any_character() -> None:
    """Write characters that standard output or error cannot encode as escapes. Python's own way is an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
