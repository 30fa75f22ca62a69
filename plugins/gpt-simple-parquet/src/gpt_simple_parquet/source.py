"""Local Parquet files as a stream of documents, one per row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from attrs import frozen

from gpt_simple import DataConfig, DataError, Document

SUFFIX = ".parquet"

BATCH_ROWS = 1024


@frozen
class ParquetFiles:
    """Rows of a list of files, in order. Null rows are skipped."""

    files: tuple[Path, ...]
    column: str

    def fingerprint(self) -> str:
        """A hash of the column and of the files' names, sizes and times. Hashing the content would read it twice."""
        digest = hashlib.sha256(self.column.encode())
        for file in self.files:
            stat = file.stat()
            digest.update(f"|{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def stream(self) -> Iterator[Document]:
        for file in self.files:
            with _reading(file), pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(BATCH_ROWS, columns=[self.column], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        if text:
                            yield Document(text, key=text)


def build(config: DataConfig, seed: int) -> ParquetFiles:
    """The files that ``data.path`` names. Raises an error unless each has the column ``data.text_key``."""
    if not config.path:
        raise DataError("it is not set", key="data.path", hint="name a Parquet file or a directory of them")
    paths = (config.path,) if isinstance(config.path, str) else config.path
    files = [file for path in paths for file in _find(Path(path))]
    for file in files:
        _check(file, config.text_key)
    return ParquetFiles(tuple(files), config.text_key)


def _find(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such file or directory (relative paths start at {Path.cwd()})", key="data.path")
    found = sorted(_below(path, frozenset())) if path.is_dir() else [path]
    if not found:
        raise DataError(f"{path}: the directory holds no {SUFFIX} files", key="data.path", hint="name one that does")
    return found


def _below(directory: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Files below a directory, links included, without hidden ones. A link to a directory ``above`` is not followed."""
    here = directory.resolve()
    if here in above:
        return
    with _reading(directory):
        entries = [entry for entry in directory.iterdir() if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_dir():
            yield from _below(entry, above | {here})
        elif entry.name.endswith(SUFFIX):
            yield entry


def _check(file: Path, column: str) -> None:
    with _reading(file):
        schema = pq.read_schema(file)
    if column not in schema.names:
        raise DataError(
            f"{file}: there is no column {column!r} (data.text_key); expected one of {', '.join(schema.names)}"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{file}: column {column!r} (data.text_key) holds {kind}; expected text")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error}); write it again or leave it out") from error
