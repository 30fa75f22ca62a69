"""The command ``gpt-simple``, whose subcommands are entry points.

``--help`` lists the subcommands from package metadata; only the one that is invoked is imported. So another package's
command is a command like any other, and a broken one breaks nothing but itself.
"""

from __future__ import annotations

from functools import cache

import click

from gpt_simple._names import __version__
from gpt_simple.cli.options import spelling
from gpt_simple.errors import PluginError
from gpt_simple.plugin_host.discovery import PluginRecord, commands, own_commands, summary, usable


class _Commands(click.Group):
    """Commands by name from package metadata."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_installed_commands())

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        record = own_commands().get(name) or _installed_commands().get(name)
        if record is None or record.entry_point is None:
            return None
        if record.origin == "builtin":
            command: click.Command = record.entry_point.load()
            return command
        from gpt_simple.plugin_host.loading import load_record

        foreign = load_record(record, "command")
        if not isinstance(foreign, click.Command):
            raise PluginError(f"command {record.label}: {record.value} is no click command")
        return foreign

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, *rest = args
        command = self.get_command(context, name)
        if command is None and not context.resilient_parsing:
            names = self.list_commands(context)
            message = f"There is no command {name!r}; expected one of {', '.join(names)}."
            raise click.NoSuchCommand(name, message, names, context)
        # The name as it was typed, since `run` and `train` are one command.
        return name, command, rest

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary(record)) for name, record in sorted(_installed_commands().items())])


@cache
def _installed_commands() -> dict[str, PluginRecord]:
    """The commands of all packages, by name. Finding them reads the metadata of everything that is installed."""
    return usable(commands())


@click.version_option(__version__, message="%(prog)s %(version)s", help="Print the version.")
@click.group(
    cls=_Commands,
    # Commands inherit the spelling: every option works with dashes and with underscores, and --help has one of them.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": spelling,
    },
)
def program() -> None:
    """Pretrain GPT-style language models: a small engine, everything else a plugin."""
