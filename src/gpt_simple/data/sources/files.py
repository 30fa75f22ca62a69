"""Raw text from files: ``.txt .md .py`` hold one document each, ``.jsonl`` and ``.jsonl.gz`` one per line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.sources import Document
from gpt_simple.errors import DataError

TEXT = (".txt", ".md", ".py")
JSON_LINES = (".jsonl", ".jsonl.gz")


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
            lines = file.name.endswith(JSON_LINES) if self.json_lines is None else self.json_lines
            for text in self._lines(file) if lines else (_decode(_read(file), str(file)),):
                yield Document(text, key=text)

    def _lines(self, file: Path) -> Iterator[str]:
        opener = gzip.open if file.name.endswith(".gz") else open
        with _reading(file), opener(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield self._text(line, f"{file}:{number}")

    def _text(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(_decode(line, place))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error}); expected one object per line") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: expected a JSON object, found {_kind(record)}; every line is one object with the text "
                f"under {self.text_key!r} (data.text_key)"
            )
        text = record.get(self.text_key)
        if not isinstance(text, str):
            found = f"{_kind(text)} there" if self.text_key in record else f"the keys {', '.join(record) or '(none)'}"
            raise DataError(f"{place}: expected the text under {self.text_key!r} (data.text_key), found {found}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: character {error.start} of the text is half of a surrogate pair; it stands for no text"
            ) from error
        return text


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What the system says of an unreadable file, as an error of the data."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); check data.path") from error


def build(config: DataConfig, seed: int) -> Files:
    """The files that ``data.path`` names; directories are walked in sorted order."""
    if config.path is None or config.path == () or config.path == "":
        raise DataError("data.path is not set: name a file or a directory of text, or choose data.source = 'stories'")
    paths = (config.path,) if isinstance(config.path, str) else config.path
    suffixes = {"text": TEXT, "jsonl": JSON_LINES}.get(config.format or "", TEXT + JSON_LINES)
    files = [file for path in paths for file in _find(Path(path), suffixes, by_suffix=config.format is None)]
    if not any(file.stat().st_size for file in files):
        raise DataError(f"data.path {', '.join(paths)}: all {len(files)} files are empty; there is nothing to learn")
    return Files(tuple(files), config.text_key, None if config.format is None else config.format == "jsonl")


def _find(path: Path, suffixes: tuple[str, ...], *, by_suffix: bool) -> list[Path]:
    wanted = " ".join(suffixes)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
        if not found:
            raise DataError(f"data.path {path}: the directory holds none of {wanted}; name one that does")
        return found
    if not path.exists():
        raise DataError(f"data.path {path}: no such file or directory (relative paths start at {Path.cwd()})")
    if by_suffix and not path.name.endswith(suffixes):
        raise DataError(f"data.path {path}: expected one of {wanted}; say what it is with data.format")
    return [path]


def _read(file: Path) -> bytes:
    with _reading(file):
        return file.read_bytes()


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8; convert the file to UTF-8"
        ) from error


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
