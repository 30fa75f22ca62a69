"""Where every value came from, so that a message can point at the line to change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen

from gpt_simple.errors import Problem

Kind = Literal["default", "file", "env", "cli", "python"]


@frozen
class Origin:
    """One place that set a value, and the weaker place that it overrode.

    ``where`` reads ``config.toml:12``, ``$GPT_SIMPLE__TRAINING__SEED``, ``--training.seed`` or
    ``train(...)``; ``line`` is 0 unless the place is a line of a file.
    """

    kind: Kind
    where: str
    overrides: Origin | None = None
    line: int = 0


DEFAULT = Origin("default", "default")


@frozen
class Origins:
    """Dotted path -> Origin. List items are written ``data.curriculum[0].mix``."""

    by_path: Mapping[str, Origin] = field(factory=dict)

    def of(self, path: str) -> Origin:
        """Who set exactly this value, or the list that it is in; the default if nobody did."""
        return self.nearest(path) if "[" in path else self.by_path.get(path, DEFAULT)

    def nearest(self, path: str) -> Origin:
        """Who set this value or, if nobody did, the innermost table or list around it."""
        while path:
            if (origin := self.by_path.get(path)) is not None:
                return origin
            path = parent(path)
        return DEFAULT

    def locate(self, problem: Problem) -> Problem:
        """The problem with the location where its key was set, if it has a key and no location yet."""
        origin = self.of(problem.key)
        return problem if problem.location or origin.kind == "default" else problem._replace(location=origin.where)

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
        """Nobody set this value."""
        return path not in self.by_path


def parent(path: str) -> str:
    """``data.curriculum[0].mix`` -> ``data.curriculum[0]`` -> ``data.curriculum`` -> ``data`` -> ``""``."""
    if item := re.search(r"\[\d+\]$", path):
        return path[: item.start()]
    return path.rpartition(".")[0]


def join(path: str, key: str | int) -> str:
    """The path of a key of a table, or of an item of a list."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key
