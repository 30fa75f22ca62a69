"""Raw text from files: ``.txt .md .py`` hold one document each, ``.jsonl`` (also ``.gz``, ``.zst``) one per line."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import IO, cast

from attrs import field, frozen

from gpt_simple._names import install_hint
from gpt_simple.config.schema import DataConfig
from gpt_simple.data.sources import Document
from gpt_simple.errors import DataError, Problem

TEXT = (".txt", ".md", ".py")
SHOWN = 20
"""How many documents that cannot be read an error lists."""

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_COMPRESSED = frozenset({".gz", ".zst", ".bz2", ".xz", ".zip"})
_MOST_SUFFIXES = 8


@frozen
class Files:
    """Documents of a list of files, in order. Two equal texts are never separated by the split."""

    files: tuple[Path, ...]
    text_key: str = "text"
    json_lines: bool | None = None
    """Whether files hold JSON lines; None: by suffix."""
    roots: tuple[Path, ...] = ()
    """The files and directories that the user named."""
    skip: bool = False
    """Whether documents that cannot be read are left out; else all of them are one error."""
    lost: tuple[DataError, ...] = field(default=(), eq=False)
    """Directories that cannot be read and links that lead to nothing: each counts as a document that cannot be read."""
    skipped: dict[str, None] = field(factory=dict, eq=False, repr=False)
    """The documents that were left out, each once, however often the files are read."""

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.text_key}|{self.json_lines}{'|skip' * self.skip}".encode())
        for file in self.files:
            try:
                with _reading(file), file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
            except DataError:
                content = "unreadable"  # documents() reports it
            digest.update(f"|{file.name}|{content}".encode())
        if not self.skip:
            digest.update(b"|unreadable" * len(self.lost))  # else the cache would hide what documents() reports
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        bad: list[DataError] = []
        report: Bad = self._skip if self.skip else bad.append
        for error in self.lost:
            report(error)
        for file in self.files:
            lines = holds_json_lines(file) if self.json_lines is None else self.json_lines
            for text, _ in read(file, self.text_key, json_lines=lines, bad=report):
                if not bad:
                    yield Document(text, key=text)
        if bad:
            raise bad_documents(bad)

    def _skip(self, error: DataError) -> None:
        self.skipped[str(error)] = None


def bad_documents(
    errors: Sequence[DataError], hint: str = 'or leave them out: data.on_bad_document = "skip"'
) -> DataError:
    """One error of all documents that cannot be read, the first ``SHOWN`` with their places."""
    shown = [problem for error in errors[:SHOWN] for problem in error.problems]
    more = f" and {len(errors) - SHOWN:,} more" if len(errors) > SHOWN else ""
    if more:
        shown.append(Problem(None, "", f"{len(errors):,} documents cannot be read: those above{more}"))
    shown[-1] = shown[-1]._replace(hint="; ".join(filter(None, [shown[-1].hint, hint])))
    return DataError(*shown)


Bad = Callable[[DataError], None]
"""Called for a document that cannot be read: raises the error, or records it."""

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

    ``option``: the user's name of ``text_key``. ``begin`` and ``end``: only the JSON lines that begin at these bytes.
    """
    try:
        with _reading(file), _open(file, json_lines) as stream:
            if not json_lines:
                documents: Iterable[tuple[bytes, Place]] = [(stream.read(), partial(str, file))]
            else:
                documents = _lines(stream, file, begin, end)
            for data, place in documents:
                try:
                    yield _json_text(data, text_key, option) if json_lines else _decode(data), place
                except DataError as error:
                    bad(DataError(f"{place()}: {error}"))
    except DataError as error:
        bad(error)


def _lines(stream: IO[bytes], file: Path, begin: int, end: int | None) -> Iterator[tuple[bytes, Place]]:
    """The lines that begin at bytes ``begin`` to ``end``, without blank ones."""
    lines_before = cache(lambda: _lines_before(file, begin))

    def place(number: int) -> str:
        return f"{file}:{lines_before() + number}"

    position = begin
    if begin:
        # The line that holds the byte before belongs to the piece before.
        stream.seek(begin - 1)
        position += len(stream.readline()) - 1
    for number, line in enumerate(stream, 1):
        if end is not None and position >= end:
            return
        position += len(line)
        if line.strip():
            yield line, partial(place, number)


def _lines_before(file: Path, begin: int) -> int:
    """Lines that begin before a byte of a file."""
    count, left = min(begin, 1), begin - 1
    with file.open("rb") as stream:
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _json_text(line: bytes, text_key: str, option: str) -> str:
    decoded = _decode(line)
    try:
        record = json.loads(decoded)
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


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} (0x{error.object[error.start]:02x})"
        raise DataError(f"{where} is not UTF-8; convert the file to UTF-8") from error


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _open(file: Path, json_lines: bool) -> IO[bytes]:
    if json_lines and file.name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if json_lines and file.name.endswith(".zst"):
        return cast("IO[bytes]", _zstd(file).open(file, "rb"))
    return file.open("rb")


def _zstd(file: Path) -> ModuleType:
    """Python's own module for Zstandard, or its backport."""
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError as error:
        raise DataError(f"{file}: Zstandard needs another package: {install_hint('zstd')}") from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the errors of an unreadable file into a DataError."""
    known = (OSError, EOFError, zlib.error, *((_zstd(file).ZstdError,) if file.name.endswith(".zst") else ()))
    try:
        yield
    except known as error:
        raise DataError(f"{file}: cannot be read ({error})", hint="repair it, or take it out of the data") from error


def build(config: DataConfig, seed: int) -> Files:
    """The files that ``data.path`` names; directories are walked in sorted order."""
    if config.path is None or config.path == () or config.path == "":
        raise DataError(
            "it is not set",
            key="data.path",
            hint="name a file or a directory of text, or choose data.source = 'stories'",
        )
    paths = (config.path,) if isinstance(config.path, str) else config.path
    json_lines = None if config.format is None else config.format == "jsonl"
    roots = tuple(map(Path, paths))
    files: list[Path] = []
    lost: list[DataError] = []
    for root in roots:
        found, unlisted = find(root, _suffixes(json_lines), by_suffix=json_lines is None)
        files += found
        lost += unlisted
    if lost and not files:
        raise bad_documents(lost, "there is nothing else")
    if not any(file.stat().st_size for file in files):
        raise DataError(
            f"{', '.join(paths)}: all {len(files)} files are empty", key="data.path", hint="there is nothing to learn"
        )
    return Files(tuple(files), config.text_key, json_lines, roots, config.on_bad_document == "skip", tuple(lost))


def find(
    path: Path, suffixes: tuple[str, ...] = TEXT + JSON_LINES, *, by_suffix: bool = True, option: str = ""
) -> tuple[list[Path], list[DataError]]:
    """A file, or all files with these suffixes below a directory, in sorted order, but none that is hidden.

    With it comes an error for each directory that cannot be read and each link that leads to nothing. ``option`` names
    ``path`` in errors; by default it is data.path. Links are followed.
    """

    def error(message: str, hint: str = "") -> DataError:
        if option:
            return DataError(message, location=f"{option} {path}", hint=hint)
        return DataError(f"{path}: {message}", key="data.path", hint=hint)

    wanted = " ".join(suffixes)
    lost: list[DataError] = []
    with _reading(path):
        is_directory, exists = path.is_dir(), path.exists()
    if is_directory:
        found = sorted(_walk(path, suffixes, frozenset(), lost.append))
        if not found and not lost:
            raise error(f"the directory holds none of {wanted}", "name one that does")
        return found, sorted(lost, key=str)
    if not exists:
        raise error(f"no such file or directory (relative paths start at {Path.cwd()})")
    if by_suffix and not path.name.endswith(suffixes):
        raise error(f"expected one of {wanted}", "say what it is with data.format")
    return [path], []


def passed_over(roots: Iterable[Path], *, json_lines: bool | None = None) -> str:
    """How many files below directories are not read, by suffix; empty if all are read."""
    suffixes = _suffixes(json_lines)
    # The first walk has reported what is bad.
    files = (f for root in roots if root.is_dir() for f in _walk(root, ("",), frozenset(), lambda error: None))
    counts = Counter(_suffix(file) for file in files if not file.name.endswith(suffixes))
    if not counts:
        return ""
    named = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(_MOST_SUFFIXES))
    more = ", ..." if len(counts) > _MOST_SUFFIXES else ""
    return f"passed over {counts.total():,} files ({named}{more}): what is read ends in {' '.join(suffixes)}"


def _suffixes(json_lines: bool | None) -> tuple[str, ...]:
    return TEXT + JSON_LINES if json_lines is None else JSON_LINES if json_lines else TEXT


def _suffix(file: Path) -> str:
    *before, last = file.suffixes or ["without a suffix"]
    return f"{before[-1]}{last}" if before and last in _COMPRESSED else last


def _walk(directory: Path, suffixes: tuple[str, ...], above: frozenset[Path], bad: Bad) -> Iterator[Path]:
    """Files below a directory, without links to one of the directories ``above``.

    ``bad`` is called for each directory that cannot be read and each link that leads to nothing.
    """
    try:
        with _reading(directory):
            here = directory.resolve()
            entries = [] if here in above else list(directory.iterdir())
    except DataError as error:
        bad(error)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            with _reading(entry):
                mode = entry.stat().st_mode
        except DataError as error:
            bad(_dangling(entry, error) or error)
            continue
        if stat.S_ISDIR(mode):
            yield from _walk(entry, suffixes, above | {here}, bad)
        elif entry.name.endswith(suffixes) and stat.S_ISREG(mode):
            yield entry


def _dangling(entry: Path, error: DataError) -> DataError | None:
    """The error of a link that leads to nothing; None for what has another ``error``."""
    if not (isinstance(error.__cause__, FileNotFoundError) and entry.is_symlink()):
        return None
    target = os.readlink(entry)
    return DataError(f"{entry}: links to {target}, which does not exist", hint="repair the link or remove it")
