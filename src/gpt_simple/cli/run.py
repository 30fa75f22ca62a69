"""Train a model as a configuration says, or continue a run that was stopped."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from gpt_simple.cli.fields import ConfigRequest, ConfiguredCommand
from gpt_simple.cli.main import BEGAN
from gpt_simple.cli.terminal import announced
from gpt_simple.engine.compatibility import keep_values_of_run
from gpt_simple.errors import ExitCode, GptSimpleError
from gpt_simple.launch import member
from gpt_simple.launch.record import Records
from gpt_simple.launch.signals import stop_on_signals
from gpt_simple.launch.torchrun import Launch
from gpt_simple.preflight.data import refuse_bad_data
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from gpt_simple.run_dir.stop_request import record_kill
from gpt_simple.spec import RunSpec


@click.command(cls=ConfiguredCommand, config_required=True)
@click.option("--force", is_flag=True, help="Discard the run in output_dir, once the new one is validated.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "live", "lines", "json", "off"]),
    help="How progress is shown: --plugins.console.progress.",
)
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors: --progress off.")
@click.option(
    "--nproc_per_node",
    metavar="N|auto",
    help="Train on N processes of this machine (auto: one per GPU), started by torchrun.",
)
@click.option("--nnodes", metavar="N", help="Machines; start the same command on each of them.")
@click.option("--rdzv_endpoint", metavar="HOST:PORT", help="Where the machines meet: one of them and a free port.")
@click.option(
    "--max_restarts",
    type=click.IntRange(min=0),
    metavar="N",
    help="After a crash, resume from the last checkpoint, at most N times.",
)
def run(request: ConfigRequest, force: bool, progress: str | None, quiet: bool, **options: Any) -> int:
    """Train as CONFIG (.toml, .yaml, .json) says. The same command continues a run that was stopped.

    CONFIG may also be the directory of a run, which goes on with its own configuration.

    Every field of the configuration is an option: --training.max_steps 5000 --optimizer.learning_rate=1e-4.
    """
    if quiet or progress:
        request = request.overriding("plugins.console.progress", "off" if quiet else str(progress))
    launch = Launch.asked(**options)
    if launch is not None and not launch.joins(os.environ):
        return _run_launcher(request, launch)
    if member.is_member(os.environ):
        member.live(partial(_run_process, request, force))
    return _run_process(request, force)


train = run
"""The same command under its other name."""


def _run_launcher(request: ConfigRequest, launch: Launch) -> int:
    """Start the processes, unless there is a mistake in the configuration."""
    pending: list[str] = []
    with stop_on_signals(pending.append, is_last=True):
        spec = request.resolve()
        _refuse_bad_data(spec)
        run_dir = RunDir(Path(spec.config.training.output_dir))
        with _announced(spec):
            code = launch.run([*_program(), *request.arguments], pending)
        if code == ExitCode.FORCED:
            record_kill(run_dir, "second Ctrl-C")
        return code


def _run_process(request: ConfigRequest, force: bool) -> int:
    """Train in this process, alone or as one of several. Signals that arrive while torch loads are kept."""
    pending: list[str] = []
    try:
        with stop_on_signals(pending.append, is_last=True):
            return _train(request, force, pending)
    finally:
        member.give_up_broken_output()


def _train(request: ConfigRequest, force: bool, pending: list[str]) -> int:
    spec = _resolve_once(request, force, pending)
    if member.is_restarted() and _has_begun(spec):
        # Whatever the launch began with, a restarted process resumes from what the launch has reached.
        force = False
        spec = _resolve_once(request.overriding("training.resume", "auto"), force, pending)
    launched = member.launched_at()
    if launched is None and not member.has_foreign_launcher(os.environ):
        _refuse_bad_data(spec)
    # Only now: a mistake in the configuration is reported without the seconds that torch takes to load.
    with nullcontext() if launched else _announced(spec):
        from gpt_simple.distributed.process_group import disband
        from gpt_simple.job.train import train

    started = BEGAN if launched is None else launched
    code = int(train(spec, force=force, pending_signals=pending, started=started).exit_code)
    disband()
    return code


def _refuse_bad_data(spec: RunSpec) -> None:
    """Report data that cannot be read before the seconds that torch takes to load."""
    with spec.located_errors():
        refuse_bad_data(spec.config, spec.registry)


def _announced(spec: RunSpec) -> AbstractContextManager[None]:
    """Announce what comes before the first lines of the console, unless that shows nothing."""
    console = next((plugin.instance for plugin in spec.host.plugins if plugin.name == "console"), None)
    if console is None or console.config.progress == "off":
        return nullcontext()
    return announced("starting: PyTorch is loaded, then come the data and the model", began=BEGAN)


def _resolve_once(request: ConfigRequest, force: bool, pending: list[str]) -> RunSpec:
    """The configuration, with the defaults of the run that it resumes.

    Under a foreign launcher every process finds a mistake, and one of them reports it.
    """
    try:
        return keep_values_of_run(request.resolve(), force=force)
    except GptSimpleError as error:
        if not member.has_foreign_launcher(os.environ):
            raise
        from gpt_simple.distributed.process_group import report_once

        raise report_once(error, pending_signals=pending) from None


def _has_begun(spec: RunSpec) -> bool:
    """Whether this launch has claimed its run directory, before torchrun restarted its processes."""
    if (records := Records.of_this_launch(os.environ)) is not None:
        return records.has_owned()
    # Another launcher keeps no record. A run that is already there must not be discarded.
    return bool(RunRecord.load(RunDir(Path(spec.config.training.output_dir))).lineage)


def _program() -> list[str]:
    """This program as a command. Like the script, and unlike ``-m``, it imports nothing from the current directory."""
    safe = [] if Path(sys.argv[0]).name == "__main__.py" else ["-P"]
    return [sys.executable, *safe, "-m", "gpt_simple"]
