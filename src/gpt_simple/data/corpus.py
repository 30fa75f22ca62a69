"""A directory of raw text as pieces of work: which files, which bucket each belongs to, and how they are shared out.

What is in a unit depends on the files alone, never on who works on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field, frozen

from gpt_simple.data.manifest import ALL
from gpt_simple.data.sources import files
from gpt_simple.errors import DataError

UNIT_BYTES = 1 << 22
"""A unit is about this much of files on disk; more when there is so much that it would make too many units."""

MOST_UNITS = 1 << 12

SHOWN = 100
"""So many skipped documents of a unit are named, the others are counted."""


@frozen
class Piece:
    """A file, or the JSON lines of it that begin at bytes ``begin`` to ``end``."""

    file: Path
    begin: int
    end: int


@frozen
class Unit:
    """Some pieces of one bucket, in order."""

    bucket: str
    pieces: tuple[Piece, ...]
    state: str
    """Names, sizes and times of the files: changes when one of them does."""

    @property
    def size(self) -> int:
        return sum(piece.end - piece.begin for piece in self.pieces)

    def key(self, settings: str) -> str:
        """Of everything that what is made of the unit depends on."""
        return hashlib.sha256(f"{settings}|{self.state}".encode()).hexdigest()[:24]


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
    pieces: dict[str, list[tuple[Piece, str]]] = {}
    for file, stat in found:
        name = file.relative_to(root)
        bucket = name.parts[0] if len(name.parts) > 1 else ALL
        step = wanted if file.name.endswith(".jsonl") else max(1, stat.st_size)
        for begin in range(0, max(1, stat.st_size), step):
            end = min(begin + step, stat.st_size)
            state = json.dumps([name.as_posix(), stat.st_size, stat.st_mtime_ns, begin, end])
            pieces.setdefault(bucket, []).append((Piece(file, begin, end), state))
    return [unit for bucket in sorted(pieces) for unit in _grouped(bucket, pieces[bucket], wanted)]


def read(unit: Unit, text_key: str, skipped: Skipped) -> Iterator[str]:
    """The texts of a unit's documents, without those that are empty or cannot be read."""
    for piece in unit.pieces:
        for text, place in _texts(piece, text_key, skipped.add):
            if text:
                yield text
            else:
                skipped.add_empty(place)


def _texts(piece: Piece, text_key: str, bad: files.Bad) -> Iterator[tuple[str, files.Place]]:
    # A file of 0 bytes holds one document without text, whatever its suffix.
    lines = files.holds_json_lines(piece.file) and piece.end > 0
    # Positions in a compressed file are not those of its text; it is one piece.
    part = (piece.begin, piece.end) if piece.file.name.endswith(".jsonl") else (0, None)
    return files.read(piece.file, text_key, json_lines=lines, bad=bad, option="--text_key", begin=part[0], end=part[1])


def _grouped(bucket: str, pieces: list[tuple[Piece, str]], wanted: int) -> Iterator[Unit]:
    group: list[tuple[Piece, str]] = []
    size = 0
    for piece, state in pieces:
        if group and size + piece.end - piece.begin > wanted:
            yield _unit(bucket, group)
            group, size = [], 0
        group.append((piece, state))
        size += piece.end - piece.begin
    yield _unit(bucket, group)


def _unit(bucket: str, group: list[tuple[Piece, str]]) -> Unit:
    return Unit(bucket, tuple(piece for piece, _ in group), "|".join(state for _, state in group))
