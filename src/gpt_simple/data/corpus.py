"""A directory of raw text as units of work: which files, which bucket each belongs to, and how they are divided.

The content of a unit depends on the files alone, never on the number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field, frozen

from gpt_simple.data.manifest import ALL
from gpt_simple.data.sources import files
from gpt_simple.errors import DataError

UNIT_BYTES = 1 << 22
"""A unit is about this much of files on disk; more if that made more than ``MOST_UNITS``."""

MOST_UNITS = 1 << 12

SHOWN = 100
"""How many skipped documents of a unit are named; the others are counted."""


@frozen
class Piece:
    """A file, or the JSON lines of it that begin at bytes ``begin`` to ``end``."""

    file: Path
    begin: int
    end: int
    state: str
    """Name, size and time of the file, ``begin`` and ``end``: changes when the text does."""

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


def find_units(root: Path) -> list[Unit]:
    """All text below a directory. Its sub-directories are the buckets; files beside them are in ``all``."""
    if not root.is_dir():
        raise DataError("no such directory", location=f"--input_dir {root}")
    found = [(file, file.stat()) for file in files.find(root, option="--input_dir")]
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
    return [unit for bucket in sorted(buckets) for unit in _units(bucket, buckets[bucket], wanted)]


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
