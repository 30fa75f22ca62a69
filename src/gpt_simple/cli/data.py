"""Inspect prepared data: ``gpt-simple data inspect DATA``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gpt_simple.cli.paths import PATH


@click.group()
def data() -> None:
    """Inspect prepared data."""


@data.command()
@click.argument("directory", metavar="DATA", type=PATH)
@click.option("--sample", default=200, show_default=True, type=click.IntRange(0), help="Tokens of text to show.")
def inspect(directory: Path, sample: int) -> None:
    """Describe the dataset directory DATA, after comparing every file with its checksum."""
    from gpt_simple.data.inspect import inspect

    lines = inspect(directory, sample_tokens=sample, log=lambda message: click.echo(message, err=True))
    text = "\n".join(lines)
    click.echo(_printable(text) if sys.stdout.isatty() else text)


def _printable(text: str) -> str:
    """Control characters of the data must not reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
