"""Train a model as a configuration says, or go on with a run that was stopped."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from attrs import evolve, frozen

from gpt_simple.cli.fields import OVERRIDES, ConfiguredCommand, plugins_option
from gpt_simple.cli.main import BEGAN
from gpt_simple.errors import ExitCode, GptSimpleError
from gpt_simple.launch import member
from gpt_simple.launch.record import Records
from gpt_simple.launch.signals import stop_on_signals
from gpt_simple.launch.torchrun import Launch
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from gpt_simple.run_dir.stop_request import record_kill
from gpt_simple.spec import RunSpec, resolve_spec

_GIVEN = "gpt_simple.arguments"


class LaunchedCommand(ConfiguredCommand):
    """A command that other processes can be started with: its arguments are kept as they were given."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta[_GIVEN] = list(args)
        return super().parse_args(context, args)


@frozen
class RunCommand:
    """What was asked for on the command line. ``arguments``: what followed the program's name."""

    path: str | None
    overrides: tuple[tuple[str, str], ...]
    switches: Switches
    force: bool
    arguments: tuple[str, ...]

    def resolve(self, *more: tuple[str, str]) -> RunSpec:
        """The configuration with all of its mistakes reported at once; without torch."""
        spec = resolve_spec(self.path, overrides=[*self.overrides, *more], switches=self.switches)
        return evolve(spec, arguments=self.arguments)


@click.pass_context
def _run(
    context: click.Context,
    path: str | None,
    option: str | None,
    force: bool,
    plugins: tuple[str, ...],
    no_plugins: bool,
    progress: str | None,
    quiet: bool,
    nproc_per_node: str | None,
    nnodes: str | None,
    rdzv_endpoint: str | None,
    max_restarts: int | None,
) -> int:
    overrides: list[tuple[str, str]] = context.meta[OVERRIDES]
    if path and option and path != option:
        raise click.UsageError(f"two configurations were given: {path} and --config {option}")
    if not (path or option or overrides):
        raise click.UsageError("a configuration is missing: gpt-simple run config.toml")
    if quiet or progress:
        overrides = [*overrides, ("plugins.console.progress", progress if progress and not quiet else "off")]
    launch = Launch.asked(nproc_per_node, nnodes, rdzv_endpoint, max_restarts)
    command = RunCommand(
        path or option,
        tuple(overrides),
        Switches.parse(plugins, no_plugins=no_plugins),
        force,
        (context.info_name or "run", *context.meta[_GIVEN]),
    )
    if launch is not None and not launch.joins(os.environ):
        return run_launcher(command, launch)
    if member.is_member(os.environ):
        member.live(partial(run_process, command))
    return run_process(command)


def run_launcher(command: RunCommand, launch: Launch) -> int:
    """Start the processes. A mistake in the configuration is found before, so that it starts none."""
    run_dir = RunDir(Path(command.resolve().config.training.output_dir))
    code = launch.run([*_program(), *command.arguments])
    if code == ExitCode.FORCED:
        record_kill(run_dir, "second Ctrl-C")
    return code


def run_process(command: RunCommand) -> int:
    """Train in this process, alone or as one of several. Signals that arrive while torch loads are kept."""
    pending: list[str] = []
    try:
        with stop_on_signals(pending.append):
            return _train(command, pending)
    finally:
        member.give_up_broken_output()


def _train(command: RunCommand, pending: list[str]) -> int:
    spec, force = _resolve_once(command), command.force
    if member.is_restarted() and _has_begun(spec):
        # Whatever it began with, it goes on now from what it has reached.
        spec, force = command.resolve(("training.resume", "auto")), False
    # Only now: a mistake in the configuration is reported without the seconds that torch takes to load.
    from gpt_simple.distributed.process_group import disband
    from gpt_simple.job.train import train

    code = int(train(spec, force=force, pending_signals=pending, started=_began()).exit_code)
    disband()
    return code


def _resolve_once(command: RunCommand) -> RunSpec:
    """The configuration. Under a foreign launcher, where every process finds a mistake, one reports it."""
    try:
        return command.resolve()
    except GptSimpleError as error:
        if not member.has_foreign_launcher(os.environ):
            raise
        from gpt_simple.distributed.process_group import report_once

        raise report_once(error) from None


def _began() -> float:
    """The moment of ``time.monotonic`` at which this launch began, its launcher's if it has one."""
    launched = member.launched_at()
    return BEGAN if launched is None else launched


def _has_begun(spec: RunSpec) -> bool:
    """Whether this launch came as far as to own its run directory, before torchrun restarted its processes."""
    if (records := Records.of_this_launch(os.environ)) is not None:
        return records.has_owned()
    # Another launcher keeps no record: whatever is there must not be discarded.
    return bool(RunRecord.load(RunDir(Path(spec.config.training.output_dir))).lineage)


def _program() -> list[str]:
    """This program as a command. Like the script, and unlike ``-m``, it imports nothing from the current directory."""
    safe = [] if Path(sys.argv[0]).name == "__main__.py" else ["-P"]
    return [sys.executable, *safe, "-m", "gpt_simple"]


_OPTIONS = (
    click.argument("path", metavar="[CONFIG]", type=click.Path(), required=False),
    click.option("-c", "--config", "option", metavar="FILE", type=click.Path(), help="The same as CONFIG."),
    click.option("--force", is_flag=True, help="Discard the run in output_dir, once the new one is validated."),
    plugins_option("Switch a plugin on (NAME, ./file.py) or off (no:NAME)."),
    click.option("--no-plugins", is_flag=True, help="Only built-in plugins, whatever the configuration says."),
    click.option(
        "--progress",
        type=click.Choice(["auto", "live", "lines", "json", "off"]),
        help="How progress is shown: --plugins.console.progress.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors: --progress off."),
    click.option(
        "--nproc_per_node",
        metavar="N|auto",
        help="Train on N processes of this machine (auto: one per GPU), started by torchrun.",
    ),
    click.option("--nnodes", metavar="N", help="Machines; start the same command on each of them."),
    click.option("--rdzv_endpoint", metavar="HOST:PORT", help="Where the machines meet: one of them and a free port."),
    click.option(
        "--max_restarts",
        type=click.IntRange(min=0),
        metavar="N",
        help="After a crash go on from the last checkpoint, at most N times.",
    ),
)
_TORCHRUN_SPELLINGS = {name.replace("_", "-"): name for name in ("nproc_per_node", "rdzv_endpoint", "max_restarts")}
"""torchrun takes these options with dashes, too; ``--help`` has one spelling of each."""

_HELP = """Train as CONFIG (.toml, .yaml, .json) says. The same command goes on after a stop.

Every field of the configuration is an option: --training.max_steps 5000 --optimizer.learning_rate=1e-4.
"""


def _command(name: str) -> click.Command:
    decorated: Any = _run
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    settings = {
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": lambda name: _TORCHRUN_SPELLINGS.get(name, name),
    }
    return click.command(name, cls=LaunchedCommand, context_settings=settings, help=_HELP)(decorated)


run = _command("run")
train = _command("train")
