"""Write an HTML report about one run or several: ``gpt-simple report RUN [RUN ...]``."""

from __future__ import annotations

from pathlib import Path

import click

from gpt_simple._files import write_whole
from gpt_simple.cli.paths import PATH
from gpt_simple.cli.terminal import announced, echo
from gpt_simple.errors import ConfigError
from gpt_simple.report.history import read_history
from gpt_simple.report.page import SIGNATURE, page


@click.command()
@click.argument("runs", metavar="RUN...", type=PATH, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=PATH,
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
        if _is_foreign(target):
            raise ConfigError(
                f"{target} is there already and is no report", hint="move it away, or choose another one with --output"
            )
        text = page(histories)
        if output is not None and (output.is_symlink() or (output.exists() and not output.is_file())):
            output.write_text(text, encoding="utf-8")  # a terminal, a pipe, or a link that the user has named
        else:
            write_whole(target, text)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}): choose another one with --output") from error
    echo(f"{target} ({len(text.encode()) / 1024:.0f} KiB)")


def _is_foreign(target: Path) -> bool:
    """Whether something else than this command wrote the file. An empty one holds nothing that could be lost."""
    return target.is_file() and target.stat().st_size > 0 and SIGNATURE.encode() not in target.read_bytes()[-500:]


def _labels(directories: list[Path]) -> list[str]:
    """The names of the directories, or their whole paths where names would be the same."""
    names = [path.resolve().name for path in directories]
    return names if len(set(names)) == len(names) else [str(path) for path in directories]
