"""Train a model as a configuration says, or go on with a run that was stopped."""

from __future__ import annotations

from typing import Any

import click

from gpt_simple.assembly import assemble
from gpt_simple.cli.fields import ConfiguredCommand
from gpt_simple.hooks.activation import Switches


@click.pass_obj
def _train(
    overrides: list[tuple[str, str]],
    path: str | None,
    option: str | None,
    force: bool,
    plugins: tuple[str, ...],
    no_plugins: bool,
    progress: str | None,
    quiet: bool,
) -> int:
    if path and option and path != option:
        raise click.UsageError(f"two configurations were given: {path} and --config {option}")
    if not (path or option or overrides):
        raise click.UsageError("a configuration is missing: gpt-simple run config.toml")
    if quiet or progress:
        overrides = [*overrides, ("plugins.console.progress", progress if progress and not quiet else "off")]
    assembly = assemble(path or option, overrides=overrides, switches=Switches.parse(plugins, no_plugins=no_plugins))
    # Only now: a mistake in the configuration is told without the seconds that torch takes to load.
    from gpt_simple.engine.session import train

    return int(train(assembly, force=force).exit_code)


_OPTIONS = (
    click.argument("path", metavar="[CONFIG]", required=False),
    click.option("-c", "--config", "option", metavar="FILE", help="The same as CONFIG."),
    click.option("--force", is_flag=True, help="Discard the run in output_dir, once the new one is validated."),
    click.option(
        "-p",
        "plugins",
        multiple=True,
        metavar="NAME",
        help="Switch a plugin on (NAME, ./file.py) or off (no:NAME).",
    ),
    click.option("--no-plugins", is_flag=True, help="Only built-in plugins, whatever the configuration says."),
    click.option(
        "--progress",
        type=click.Choice(["auto", "live", "lines", "off"]),
        help="How progress is shown: --plugins.console.progress.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors: --progress off."),
)
_HELP = """Train as CONFIG (.toml, .yaml, .json) says. The same command goes on after a stop.

Every field of the configuration is an option: --training.max_steps 5000 --optimizer.learning_rate=1e-4.
"""


def _command(name: str) -> click.Command:
    decorated: Any = _train
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    return click.command(name, cls=ConfiguredCommand, context_settings=settings, help=_HELP)(decorated)


run = _command("run")
train = _command("train")
