"""``gpt-simple stop RUN``: ask a run to save a checkpoint and end, from any terminal and without torch."""

from __future__ import annotations

from pathlib import Path

import click

from gpt_simple.cli.paths import PATH
from gpt_simple.cli.terminal import echo
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.stop_request import ask_to_stop


@click.command()
@click.argument("run", type=PATH)
@click.option("--force", is_flag=True, help="End it at once; the steps since its last checkpoint are lost.")
def stop(run: Path, force: bool) -> None:
    """Ask the run in directory RUN to save a checkpoint and end (exit code 75). The command of the run continues it.

    RUN is the training.output_dir of the run. From another machine, the request is a file that the run checks for.
    """
    echo(ask_to_stop(RunDir(run), force=force))
