"""What the options of all commands have in common: their spelling, and numbers without NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import click


def spelling(name: str) -> str:
    """The one name of an option that may be written with dashes or with underscores."""
    return name.replace("-", "_")


def as_typed(error: click.NoSuchOption, arguments: Iterable[str]) -> click.NoSuchOption:
    """The same error about the option as it was typed, and not by its one name."""
    typed = (word.partition("=")[0] for word in arguments)
    name = next((word for word in typed if spelling(word[2:]) == error.option_name[2:]), error.option_name)
    return click.NoSuchOption(name, possibilities=error.possibilities, ctx=error.ctx)


class Number(click.FloatRange):
    """A range of numbers without NaN, which click accepts in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("expected a number, got NaN", param, ctx)
        return number
