"""A directory of raw text as units of work, and each unit as tokens on disk.

The content of a unit depends on the files alone, never on the number of processes. Several processes encode units; each
part is written whole or not at all. A part is ``KEY.tokens`` (documents, each ended by EOD), ``KEY.documents`` (a
DOCUMENT of each) and, written last, ``KEY.json``. The key is a hash of all that the part was made from, so a part that
is found after a kill can be used.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, define, field, frozen
from numpy.typing import NDArray

from gpt_simple._documents import COUNT
from gpt_simple._documents import read as read_document
from gpt_simple._files import write_whole
from gpt_simple.data.cache import remove
from gpt_simple.data.manifest import ALL, content, token_dtype
from gpt_simple.data.sources import files
from gpt_simple.data.tokenize import batches, encode_documents, key_hash
from gpt_simple.data.tokenizer import JsonTokenizer, load_tokenizer
from gpt_simple.errors import DataError, GptSimpleError

UNIT_BYTES = 1 << 22
"""A unit is about this much of files on disk; more if that made more than ``MOST_UNITS``."""

MOST_UNITS = 1 << 12

SHOWN = 100
"""How many skipped documents of a unit are named; the others are counted."""

_SKIPPED = {"bad": COUNT, "errors": [str], "empty": COUNT, "without_text": [str]}

DOCUMENT = np.dtype([("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
"""Of each document: the hash of its text, its tokens with the EOD, its bytes of UTF-8."""


@frozen
class Piece:
    """A file, or the JSON lines of it that begin at bytes ``begin`` to ``end``."""

    file: Path
    begin: int
    end: int
    state: str
    """Name, size and time of the file, with ``begin`` and ``end``: changes when the text does."""

    @property
    def size(self) -> int:
        return self.end - self.begin


@frozen
class Unit:
    """Some pieces of one bucket, in order."""

    bucket: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def state(self) -> str:
        return "|".join(piece.state for piece in self.pieces)


@define
class Skipped:
    """Documents that were left out: those without text, and those that could not be read, some with their places."""

    empty: int = 0
    bad: int = 0
    errors: list[str] = field(factory=list)
    without_text: list[str] = field(factory=list)

    def add(self, error: DataError) -> None:
        self.bad += 1
        if len(self.errors) < SHOWN:
            self.errors.append(str(error))

    def add_empty(self, place: files.Place) -> None:
        self.empty += 1
        if len(self.without_text) < SHOWN:
            self.without_text.append(f"{place()}: no text")

    def extend(self, other: Skipped) -> None:
        self.empty += other.empty
        self.bad += other.bad
        self.errors += other.errors
        self.without_text += other.without_text


def find_units(root: Path) -> tuple[list[Unit], Skipped]:
    """All text below a directory, and what of it cannot be listed.

    Its sub-directories are the buckets; files beside them are in ``all``.
    """
    if not root.is_dir():
        raise DataError("no such directory", location=f"--input_dir {root}")
    paths, unlisted = files.find(root, option="--input_dir")
    if not paths:
        raise files.bad_documents(unlisted, "there is nothing else")
    lost = Skipped()
    for error in unlisted:
        lost.add(error)
    found = [(file, file.stat()) for file in paths]
    total = sum(stat.st_size for _, stat in found)
    if not total:
        raise DataError(
            f"all {len(found)} files are empty", location=f"--input_dir {root}", hint="there is nothing to tokenize"
        )
    wanted = max(UNIT_BYTES, -(-total // MOST_UNITS))
    buckets: dict[str, list[Piece]] = {}
    for file, stat in found:
        name = file.relative_to(root)
        bucket = name.parts[0] if len(name.parts) > 1 else ALL
        step = wanted if file.name.endswith(".jsonl") else max(1, stat.st_size)
        for begin in range(0, max(1, stat.st_size), step):
            end = min(begin + step, stat.st_size)
            state = json.dumps([name.as_posix(), stat.st_size, stat.st_mtime_ns, begin, end])
            buckets.setdefault(bucket, []).append(Piece(file, begin, end, state))
    return [unit for bucket in sorted(buckets) for unit in _units(bucket, buckets[bucket], wanted)], lost


def read(unit: Unit, text_key: str, skipped: Skipped) -> Iterator[str]:
    """The texts of a unit's documents, without those that are empty or cannot be read."""
    for piece in unit.pieces:
        # A file of 0 bytes holds one document without text, whatever its suffix.
        lines = files.holds_json_lines(piece.file) and piece.end > 0
        # Positions in a compressed file are not those of its text; it is one piece.
        begin, end = (piece.begin, piece.end) if piece.file.name.endswith(".jsonl") else (0, None)
        for text, place in files.read(
            piece.file, text_key, json_lines=lines, bad=skipped.add, option="--text_key", begin=begin, end=end
        ):
            if text:
                yield text
            else:
                skipped.add_empty(place)


def _units(bucket: str, pieces: list[Piece], wanted: int) -> Iterator[Unit]:
    """The pieces of a bucket in groups of about ``wanted`` bytes."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > wanted:
            yield Unit(bucket, tuple(group))
            group, size = [], 0
        group.append(piece)
        size += piece.size
    yield Unit(bucket, tuple(group))


@frozen
class Settings:
    """What a part depends on beside its unit, and the directory of parts. ``fingerprint``: the tokenizer's settings."""

    directory: Path
    tokenizer: Path
    fingerprint: str
    text_key: str
    eod_id: int

    def part(self, unit: Unit) -> Path:
        """The ``.json`` of the unit's part."""
        made_from = f"{self.fingerprint}|{self.text_key}|{unit.state}"
        return self.directory / f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.json"


def documents_of(unit: Unit, settings: Settings) -> NDArray[Any]:
    """A DOCUMENT of each of a unit's documents."""
    return np.fromfile(settings.part(unit).with_suffix(".documents"), DOCUMENT)


def tokens_of(unit: Unit, settings: Settings) -> NDArray[Any]:
    """The tokens of all of a unit's documents, each ended by EOD."""
    return np.fromfile(settings.part(unit).with_suffix(".tokens"), token_dtype(tokenizer_of(settings).vocab_size))


def skipped_of(unit: Unit, settings: Settings) -> Skipped | None:
    """What was left out of the part of a unit; None if there is no part, or another content than was written."""
    path = settings.part(unit)
    try:
        record = read_document(path, {"skipped": _SKIPPED, "sha256": str})
        skipped = Skipped(**record["skipped"])
        whole = record["sha256"] == _checksum(path, skipped)
    except (OSError, ValueError):
        return None
    return skipped if whole else None


def _checksum(path: Path, skipped: Skipped) -> str:
    """A hash of all that a part holds."""
    files = [content(path.with_suffix(suffix)) for suffix in (".tokens", ".documents")]
    return hashlib.sha256(json.dumps([asdict(skipped), files]).encode()).hexdigest()


def make_part(unit: Unit, settings: Settings) -> Skipped:
    """Encode a unit; returns what of it was left out."""
    tokenizer, skipped, path = tokenizer_of(settings), Skipped(), settings.part(unit)
    dtype = token_dtype(tokenizer.vocab_size)
    for suffix in (".tokens", ".documents", ".json"):
        remove(path.with_suffix(suffix))
    with path.with_suffix(".tokens").open("wb") as tokens, path.with_suffix(".documents").open("wb") as documents:
        for texts in batches(read(unit, settings.text_key, skipped), str):
            ids, sizes = encode_documents(tokenizer, texts)
            tokens.write(ids.astype(dtype).data)
            known = [(key_hash(t), size, len(t.encode())) for t, size in zip(texts, sizes.tolist(), strict=True)]
            documents.write(np.array(known, DOCUMENT).data)
        for file in (tokens, documents):
            file.flush()
            os.fsync(file.fileno())
    write_whole(path, json.dumps({"skipped": asdict(skipped), "sha256": _checksum(path, skipped)}))
    return skipped


def make_parts(units: Sequence[Unit], settings: Settings, workers: int) -> Generator[tuple[Unit, Skipped], None, None]:
    """Encode units in ``workers`` processes; each with what was left out, in the order in which they are finished."""
    if workers == 1 or len(units) <= 1:
        for unit in units:
            yield unit, make_part(unit, settings)
        return
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(units)), context, initializer=_start)
    try:
        with _signals_blocked():
            jobs = {pool.submit(make_part, unit, settings): unit for unit in units}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise GptSimpleError(
            "a process that tokenizes has died, perhaps because memory ran out",
            hint="what is done is kept: run the command again, with a lower --num_workers if need be",
        ) from error
    finally:
        # A part is whole or not there, so nothing is lost. Waiting for the end leaves no semaphore behind.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started meanwhile ignore the signals that a terminal or a scheduler sends to all of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    """In a new process: encode in one thread, and exit when the parent ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent(sentinel: int = parent.sentinel) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@lru_cache(maxsize=1)
def tokenizer_of(settings: Settings) -> JsonTokenizer:
    """The tokenizer of all parts, loaded once in each process."""
    return load_tokenizer(settings.tokenizer, end=settings.eod_id)
