"""What commands print: text that neither acts on a terminal nor fails on one that is not UTF-8."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_ACTS = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, and those that reorder text. Spaces of other scripts are not among them."""

SILENCE_SECONDS = 0.5
"""How long a command on a terminal may be silent."""


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


@contextmanager
def announced(text: str, *, began: float | None = None) -> Iterator[None]:
    """Print one line on a terminal if the block takes more than half a second; elsewhere nothing.

    ``began``: the moment of ``time.monotonic`` at which the silence began (None: now). Of several processes, the first
    prints. The block prints nothing itself in its first half second.
    """
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return

    left = SILENCE_SECONDS - (0.0 if began is None else time.monotonic() - began)
    ended = threading.Event()

    def announce() -> None:
        with suppress(OSError, ValueError):  # the terminal is gone
            if left <= 0 or not ended.wait(left):
                echo(text, err=True)

    thread = threading.Thread(target=announce, name="announce", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def write_any_character() -> None:
    """Write characters that standard output or error cannot encode as escapes. Python's own way is an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
