"""Raw text from files: ``.txt .md .py`` hold one document each, ``.jsonl`` (also ``.gz``, ``.zst``) one per line."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import IO, cast

from attrs import frozen

from gpt_simple._names import install_hint
from gpt_simple.config.schema import DataConfig
from gpt_simple.data.sources import Document
from gpt_simple.errors import DataError

TEXT = (".txt", ".md", ".py")
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@frozen
class Files:
    """Documents of a list of files, in order. Two equal texts are never separated by the split."""

    files: tuple[Path, ...]
    text_key: str = "text"
    json_lines: bool | None = None
    """Whether files hold JSON lines; None: by suffix."""

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.text_key}|{self.json_lines}".encode())
        for file in self.files:
            with _reading(file), file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"|{file.name}|{content}".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            lines = holds_json_lines(file) if self.json_lines is None else self.json_lines
            for text, _ in read(file, self.text_key, json_lines=lines, bad=_refuse):
                yield Document(text, key=text)


Bad = Callable[[DataError], None]
"""What becomes of a document that cannot be read: it raises the error, or makes a note of it."""

Place = Callable[[], str]
"""Where a document is: its file, and the line if it is one."""


def holds_json_lines(file: Path) -> bool:
    return file.name.endswith(JSON_LINES)


def read(
    file: Path,
    text_key: str,
    *,
    json_lines: bool,
    bad: Bad,
    option: str = "data.text_key",
    begin: int = 0,
    end: int | None = None,
) -> Iterator[tuple[str, Place]]:
    """The texts of a file's documents and where each is.

    ``option``: what the user calls ``text_key``. ``begin`` and ``end``: only the JSON lines that begin at these bytes.
    """
    try:
        if not json_lines:
            yield _decode(_read(file), str(file)), partial(str, file)
            return
        with _reading(file), _open(file) as stream:
            parse = partial(_text, text_key=text_key, option=option)
            yield from _texts(stream, file, parse, bad, begin, end)
    except DataError as error:
        bad(error)


def _texts(
    stream: IO[bytes], file: Path, parse: Callable[[bytes], str], bad: Bad, begin: int, end: int | None
) -> Iterator[tuple[str, Place]]:
    lines_before = cache(lambda: _lines_before(file, begin))

    def at(number: int) -> str:
        return f"{file}:{lines_before() + number + 1}"

    position = begin
    if begin:
        # The line that holds the byte before belongs to whoever reads what comes before.
        stream.seek(begin - 1)
        position += len(stream.readline()) - 1
    for number, line in enumerate(stream):
        if end is not None and position >= end:
            return
        position += len(line)
        if line.strip():
            try:
                yield parse(line), partial(at, number)
            except DataError as error:
                bad(DataError(f"{at(number)}: {error}"))


def _lines_before(file: Path, begin: int) -> int:
    """Lines that begin before a byte of a file."""
    if not begin:
        return 0
    count = 1
    with file.open("rb") as stream:
        left = begin - 1
        while left and (block := stream.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _text(line: bytes, text_key: str, option: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(error)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", hint="expected one object per line") from error
    if not isinstance(record, dict):
        raise DataError(
            f"expected a JSON object, found {_kind(record)}",
            hint=f"every line is one object with the text under {text_key!r} ({option})",
        )
    text = record.get(text_key)
    if not isinstance(text, str):
        found = f"{_kind(text)} there" if text_key in record else f"the keys {', '.join(record) or '(none)'}"
        raise DataError(f"expected the text under {text_key!r} ({option}), found {found}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is half of a surrogate pair", hint="it stands for no text"
        ) from error
    return text


def _refuse(error: DataError) -> None:
    raise error


def _open(file: Path) -> IO[bytes]:
    if file.name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(file, "rb"))
    return cast("IO[bytes]", _zstd(file).open(file, "rb")) if file.name.endswith(".zst") else file.open("rb")


def _zstd(file: Path) -> ModuleType:
    """Python's own module for Zstandard, or its backport."""
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError as error:
        raise DataError(f"{file}: Zstandard needs another package: {install_hint('zstd')}") from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What the system says of an unreadable file, as an error of the data."""
    known = (OSError, EOFError, zlib.error, *((_zstd(file).ZstdError,) if file.name.endswith(".zst") else ()))
    try:
        yield
    except known as error:
        raise DataError(f"{file}: cannot be read ({error})", hint="mend it, or take it out of the data") from error


def build(config: DataConfig, seed: int) -> Files:
    """The files that ``data.path`` names; directories are walked in sorted order."""
    if config.path is None or config.path == () or config.path == "":
        raise DataError(
            "it is not set",
            key="data.path",
            hint="name a file or a directory of text, or choose data.source = 'stories'",
        )
    paths = (config.path,) if isinstance(config.path, str) else config.path
    suffixes = {"text": TEXT, "jsonl": JSON_LINES}.get(config.format or "", TEXT + JSON_LINES)
    files = [file for path in paths for file in find(Path(path), suffixes, by_suffix=config.format is None)]
    if not any(file.stat().st_size for file in files):
        raise DataError(
            f"{', '.join(paths)}: all {len(files)} files are empty", key="data.path", hint="there is nothing to learn"
        )
    return Files(tuple(files), config.text_key, None if config.format is None else config.format == "jsonl")


def find(
    path: Path, suffixes: tuple[str, ...] = TEXT + JSON_LINES, *, by_suffix: bool = True, option: str = ""
) -> list[Path]:
    """A file, or all files with these suffixes below a directory, in sorted order, but none that is hidden.

    ``option``: what the user gave ``path`` with; by default data.path. Links are followed. Raises DataError for a
    directory that cannot be read and for a link that leads to nothing.
    """
    wanted = " ".join(suffixes)
    where, key, subject = (f"{option} {path}", "", "") if option else (None, "data.path", f"{path}: ")
    if path.is_dir():
        found = sorted(_walk(path, suffixes, frozenset()))
        if not found:
            raise DataError(
                f"{subject}the directory holds none of {wanted}", location=where, key=key, hint="name one that does"
            )
        return found
    if not path.exists():
        raise DataError(
            f"{subject}no such file or directory (relative paths start at {Path.cwd()})", location=where, key=key
        )
    if by_suffix and not path.name.endswith(suffixes):
        raise DataError(
            f"{subject}expected one of {wanted}", location=where, key=key, hint="say what it is with data.format"
        )
    return [path]


def _walk(directory: Path, suffixes: tuple[str, ...], above: frozenset[Path]) -> Iterator[Path]:
    """Files below a directory; a link to one of the directories ``above`` leads to nothing new."""
    here = directory.resolve()
    if here in above:
        return
    with _reading(directory):
        entries = [entry for entry in directory.iterdir() if not entry.name.startswith(".")]
        directories = {entry for entry in entries if entry.is_dir()}
    for entry in entries:
        if entry in directories:
            yield from _walk(entry, suffixes, above | {here})
        elif not entry.exists():
            raise DataError(
                f"{entry}: leads to {os.readlink(entry)}, and there is nothing", hint="mend the link or remove it"
            )
        elif entry.name.endswith(suffixes) and entry.is_file():
            yield entry


def _read(file: Path) -> bytes:
    with _reading(file):
        return file.read_bytes()


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8; convert the file to UTF-8"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
