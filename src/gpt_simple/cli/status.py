"""``gpt-simple status RUN``: what a run is doing or how it ended, from any terminal and without torch."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path

import click
from attrs import asdict

from gpt_simple.cli.paths import PATH
from gpt_simple.cli.terminal import echo
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.status import Status, read_status


@click.command()
@click.argument("run", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def status(run: Path, as_json: bool) -> None:
    """Say whether the run in directory RUN is running, completed, stopped, halted, failed or crashed.

    RUN is the training.output_dir of the run. The answer is correct even if the process or the machine died.
    """
    found = read_status(RunDir(run))
    echo(json.dumps(asdict(found)) if as_json else describe(found, now=time.time()))


def describe(status: Status, *, now: float) -> str:
    """The status as text: a line of state and progress, then a line for each reason, error, note and the process."""
    progress = [status.state, f"step {status.step}" + (f"/{status.max_steps}" if status.max_steps else "")]
    if status.loss is not None:
        progress.append(f"loss {status.loss:.4f}")
    if status.state == "running" and status.tokens_per_second is not None:
        progress.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.state == "running" and status.eta_seconds is not None:
        progress.append(f"{_duration(status.eta_seconds)} left")
    lines = ["  ".join(progress)]
    lines += [line for line in (status.reason, status.error, status.note) if line]
    if status.host is not None and status.time is not None:
        age = _duration(max(0.0, now - status.time))
        lines.append(f"process {status.pid} on {status.host}, updated {age} ago")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
