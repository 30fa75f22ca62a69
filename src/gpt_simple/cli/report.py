"""Write an HTML report about one run or several: ``gpt-simple report RUN [RUN ...]``."""

from __future__ import annotations

from pathlib import Path

import click

from gpt_simple.cli.terminal import announced, echo
from gpt_simple.errors import ConfigError
from gpt_simple.report.history import read_history
from gpt_simple.report.page import page


@click.command()
@click.argument("runs", metavar="RUN...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The file to write; unset: report.html in RUN, or here if there are several.",
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Write one HTML file about the runs in the directories RUN: curves, configuration, samples, events.

    The file needs nothing else: it can be sent, archived and printed. Secrets of the configuration are left out.
    """
    directories = list({path.resolve(): path for path in reversed(runs)}.values())[::-1]
    if len(directories) < len(runs):
        echo("a run that is named twice is shown once", err=True)
    with announced("reading the metrics"):
        histories = [read_history(root, label) for root, label in zip(directories, _labels(directories), strict=True)]
    target = output or (directories[0] if len(directories) == 1 else Path()) / "report.html"
    try:
        target.write_text(page(histories), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}): choose another one with --output") from error
    echo(f"{target} ({target.stat().st_size / 1024:.0f} KiB)")


def _labels(directories: list[Path]) -> list[str]:
    """The names of the directories, or their whole paths where names would be the same."""
    names = [path.resolve().name for path in directories]
    return names if len(set(names)) == len(names) else [str(path) for path in directories]
