"""Where every value was set, so that a message can point at the line to change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen

from gpt_simple.errors import Problem

Kind = Literal["file", "python", "env", "cli", "default"]
_RANK: Mapping[Kind, int] = {"file": 0, "python": 1, "env": 2, "cli": 3, "default": 4}


@frozen
class Origin:
    """The place that set a value, and the weaker place that it overrode.

    ``where`` reads ``config.toml:12``, ``$GPT_SIMPLE__TRAINING__SEED``, ``--training.seed`` or ``train(...)``. ``line``
    is 0 unless the place is a line of a file. ``typed`` is the text there of a number, a date or a boolean.
    """

    kind: Kind
    where: str
    overrides: Origin | None = None
    line: int = 0
    typed: str = ""

    @classmethod
    def in_file(cls, file: str, line: int, column: int = 0, *, typed: str = "") -> Origin:
        """A place in a file. Line and column count from 1; 0 is unknown."""
        return cls("file", ":".join([file, *(str(number) for number in (line, column) if number)]), None, line, typed)

    @property
    def location(self) -> str | None:
        """``where``, or None for a default."""
        return None if self.kind == "default" else self.where

    @property
    def order(self) -> tuple[int, int, str]:
        """Sort key: files by line, then Python, the environment, the command line and defaults."""
        return _RANK[self.kind], self.line, self.where

    def mistake(self, key: str, message: str, hint: str = "") -> Mistake:
        """A problem at this place, with the place to sort it by."""
        return self, Problem(self.location, key, message, hint)


Mistake = tuple[Origin, Problem]

DEFAULT = Origin("default", "default")


@frozen
class Origins:
    """Dotted path -> Origin. List items are written ``data.curriculum[0].mix``."""

    by_path: Mapping[str, Origin] = field(factory=dict)

    def of(self, path: str) -> Origin:
        """The origin of exactly this value, or of the list that it is in."""
        return self.nearest(path) if "[" in path else self.by_path.get(path, DEFAULT)

    def nearest(self, path: str) -> Origin:
        """The origin of this value or, if it is not set, of the innermost table or list around it."""
        while path:
            if (origin := self.by_path.get(path)) is not None:
                return origin
            path = parent(path)
        return DEFAULT

    def locate(self, problem: Problem) -> Problem:
        """The problem with the location where its key was set, if it has a key and no location yet."""
        return problem._replace(location=problem.location or self.of(problem.key).location)

    def place(self, path: str) -> str:
        """For messages: ``config.toml:12 (training.seed)``, or the bare path of a default."""
        return self.locate(Problem(None, path, "")).place

    def chain(self, path: str) -> list[str]:
        """The places that set this value, the strongest first: ``["--training.seed", "config.toml:4"]``."""
        origin: Origin | None = self.of(path)
        places = []
        while origin is not None:
            places.append(origin.where)
            origin = origin.overrides
        return places

    def is_default(self, path: str) -> bool:
        """Whether no source set this value."""
        return path not in self.by_path


def parent(path: str) -> str:
    """``data.curriculum[0].mix`` -> ``data.curriculum[0]`` -> ``data.curriculum`` -> ``data`` -> ``""``."""
    return path[: item.start()] if (item := re.search(r"\[\d+\]$", path)) else path.rpartition(".")[0]


def join(path: str, key: str | int) -> str:
    """The path of a key of a table, or of an item of a list."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key
