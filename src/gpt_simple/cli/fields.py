"""The fields of the configuration as command-line options: parsing, help and completion, all from the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import click
from click.shell_completion import CompletionItem

from gpt_simple.config.load import split_overrides
from gpt_simple.config.render import field_help
from gpt_simple.config.schema import PluginsConfig
from gpt_simple.config.structure import SECTIONS
from gpt_simple.config.types import FieldSpec, fields_of
from gpt_simple.errors import ConfigError

_WIDTH = 110


class ConfiguredCommand(click.Command):
    """A command that also takes every field of the configuration as ``--section.key value``.

    They are left in ``context.obj`` as (dotted key, text) pairs, in their order.
    """

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            context.obj, rest = split_overrides(args)
        except ConfigError:
            # While a shell asks for completions, the last value is not there yet.
            if not context.resilient_parsing:
                raise
            context.obj, rest = [], []
        return super().parse_args(context, rest)

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(context, formatter)
        formatter.write("\n" + option_help(builtin_configs()))

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        return [*super().shell_complete(context, incomplete), *complete(incomplete, builtin_configs())]


def builtin_configs() -> dict[str, type]:
    """Built-in plugin -> its config class."""
    from gpt_simple.hooks.activation import Switches
    from gpt_simple.hooks.discovery import installed
    from gpt_simple.hooks.host import PluginHost

    names = tuple(record.name for record in installed() if record.origin == "builtin")
    host = PluginHost.activate({}, set_keys=lambda key: False, switches=Switches(enable=names))
    return dict(sorted(host.config_classes().items()))


def option_help(plugin_configs: Mapping[str, type]) -> str:
    """Every field with its type, default and help, grouped by section, as text."""
    formatter = click.HelpFormatter(width=_WIDTH)
    for table, specs in _groups(plugin_configs):
        with formatter.section(f"[{table}]"):
            formatter.write_dl([(f"--{table}.{spec.name}", field_help(spec)) for spec in specs], col_max=42)
    return formatter.getvalue()


def complete(incomplete: str, plugin_configs: Mapping[str, type]) -> list[CompletionItem]:
    """The dotted keys that start with what was typed; nothing before the two dashes are there."""
    if not incomplete.startswith("--"):
        return []
    return [
        CompletionItem(option, help=spec.doc)
        for table, specs in _groups(plugin_configs)
        for spec in specs
        if (option := f"--{table}.{spec.name}").startswith(incomplete)
    ]


def _groups(plugin_configs: Mapping[str, type]) -> Iterator[tuple[str, tuple[FieldSpec, ...]]]:
    plugins = {f"plugins.{name}": cls for name, cls in plugin_configs.items()}
    for table, cls in {**SECTIONS, "plugins": PluginsConfig, **plugins}.items():
        if specs := fields_of(cls):
            yield table, specs
