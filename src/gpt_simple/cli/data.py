"""Inspect prepared data: ``gpt-simple data inspect DATA``."""

from __future__ import annotations

from pathlib import Path

import click

from gpt_simple.cli.paths import PATH
from gpt_simple.cli.terminal import echo


@click.group()
def data() -> None:
    """Inspect prepared data."""


@data.command()
@click.argument("directory", metavar="DATA", type=PATH)
@click.option("--sample", default=200, show_default=True, type=click.IntRange(0), help="Tokens of text to show.")
def inspect(directory: Path, sample: int) -> None:
    """Describe the dataset directory DATA, after comparing every file with its checksum."""
    from gpt_simple.data.inspect import inspect

    lines = inspect(directory, sample_tokens=sample, log=lambda message: echo(message, err=True))
    echo("\n".join(lines))
