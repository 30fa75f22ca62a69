"""The sources of the running Python's standard library: real text, tens of megabytes, on every machine."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.sources.files import Files
from gpt_simple.errors import DataError

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
"""Directories with text that was not written to be read, or that is not the library's."""


def build(config: DataConfig, seed: int) -> Files:
    """Every module of the standard library that is UTF-8, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(_modules(root))
    if not files:
        raise DataError(f"{root} holds no .py files", key="data.source", hint="use another Python or data.path")
    return Files(files, json_lines=False)


def _modules(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir() and path.name not in SKIPPED:
            yield from _modules(path)
        elif path.suffix == ".py" and _is_utf8(path):
            yield path


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
