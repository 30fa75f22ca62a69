"""The configuration on the command line: CONFIG, ``-p``, and every field as an option, all from the schema."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from attrs import evolve, frozen
from click.core import ParameterSource
from click.shell_completion import CompletionItem, split_arg_string

from gpt_simple.cli.options import as_typed
from gpt_simple.config.load import OVERRIDE, field_key, split_overrides
from gpt_simple.config.mistakes import closest
from gpt_simple.config.render import field_help
from gpt_simple.config.schema import PluginsConfig
from gpt_simple.config.structure import SECTIONS
from gpt_simple.config.types import FieldSpec, fields_of
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.components import CONFIG_KEY, builtin_registry
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.discovery import installed, usable
from gpt_simple.plugin_host.host import PluginHost
from gpt_simple.spec import RunSpec, resolve_spec

_WIDTH = 110
_INCOMPLETE = "gpt_simple.incomplete"
_OFF = "-p no:"


@frozen
class ConfigRequest:
    """The configuration and the plugins that a command line asks for.

    ``arguments`` is what followed the program's name; a command that starts other processes passes it on.
    """

    path: str | None
    overrides: tuple[tuple[str, str], ...]
    plugins: tuple[str, ...]
    no_plugins: bool
    arguments: tuple[str, ...]

    @property
    def switches(self) -> Switches:
        """The plugins that it switches on and off."""
        return Switches.parse(self.plugins, no_plugins=self.no_plugins)

    def overriding(self, key: str, text: str) -> ConfigRequest:
        """The same request with one more ``--section.key value``."""
        return evolve(self, overrides=(*self.overrides, (key, text)))

    def resolve(self) -> RunSpec:
        """The configuration with all of its mistakes reported at once; without torch."""
        spec = resolve_spec(self.path, overrides=self.overrides, switches=self.switches)
        return evolve(spec, arguments=self.arguments)


class ConfiguredCommand(click.Command):
    """A command that takes CONFIG, plugins, and every field of the configuration as ``--section.key value``.

    Its function gets all of them as one ``ConfigRequest``, the argument ``request``.
    """

    def __init__(
        self,
        name: str | None,
        *,
        params: Sequence[click.Parameter] = (),
        config_required: bool = False,
        **settings: Any,
    ) -> None:
        own = [
            click.Argument(["path"], metavar="[CONFIG]", type=click.Path(), required=False),
            click.Option(["-c", "--config", "option"], metavar="FILE", type=click.Path(), help="The same as CONFIG."),
            *plugin_options(),
        ]
        super().__init__(name, params=[*own, *params], **settings)
        self.config_required = config_required

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if context.resilient_parsing:
            return self._parse_incomplete(context, args)
        overrides, rest = split_overrides(args)
        try:
            left = super().parse_args(context, rest)
        except click.NoSuchOption as unknown:
            error = as_typed(unknown, args)
            if not (meant := _meant(error.option_name)):
                raise error from None
            message = f"there is no option {error.option_name}; did you mean {' or '.join(meant)}?"
            raise click.UsageError(message, error.ctx) from None
        path, option, plugins, no_plugins = map(context.params.pop, ("path", "option", "plugins", "no_plugins"))
        if path and option and path != option:
            raise click.UsageError(f"two configurations were given: {path} and --config {option}", context)
        if self.config_required and not (path or option or overrides):
            raise click.UsageError(f"a configuration is missing: {context.command_path} config.toml", context)
        arguments = (context.info_name or "", *args)
        context.params["request"] = ConfigRequest(path or option, tuple(overrides), plugins, no_plugins, arguments)
        return left

    def _parse_incomplete(self, context: click.Context, args: list[str]) -> list[str]:
        incomplete, args = _incomplete(args)
        try:
            _, args = split_overrides(args)
        except ConfigError:
            args = []
        left = super().parse_args(context, args)
        if incomplete is not None:
            context.meta[_INCOMPLETE] = incomplete
            # Otherwise click completes a missing argument CONFIG and does not call shell_complete below.
            for parameter in self.params:
                context.set_parameter_source(str(parameter.name), ParameterSource.COMMANDLINE)
        return left

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(context, formatter)
        formatter.write("\n" + option_help())

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        key, before = context.meta.get(_INCOMPLETE, ("", ""))
        if key == _OFF:
            return [CompletionItem(name) for name in usable(installed()) if name.startswith(incomplete.lstrip(":"))]
        if key and not incomplete.startswith("--"):
            found = _complete_value(key, incomplete)
            return [CompletionItem(before + item.value, item.type) for item in found]
        return [*super().shell_complete(context, incomplete), *complete(incomplete)]


def plugin_options() -> list[click.Parameter]:
    """``-p`` and ``--no-plugins``."""
    return [
        click.Option(
            ["-p", "plugins"],
            multiple=True,
            metavar="NAME",
            help="Switch a plugin on (NAME, ./file.py) or off (no:NAME).",
            shell_complete=complete_plugin,
        ),
        click.Option(["--no-plugins"], is_flag=True, help="Only built-in plugins, whatever the configuration says."),
    ]


def builtin_configs() -> dict[str, type]:
    """Built-in plugin -> its config class."""
    names = tuple(record.name for record in installed() if record.origin == "builtin")
    host = PluginHost.activate({}, set_keys=lambda key: False, switches=Switches(enable=names))
    return dict(sorted(host.config_classes().items()))


@cache
def builtin_fields() -> dict[str, FieldSpec]:
    """Dotted key -> field, of the core and of the built-in plugins, in the order of the tables."""
    plugins = {f"plugins.{name}": cls for name, cls in builtin_configs().items()}
    tables = {**SECTIONS, "plugins": PluginsConfig, **plugins}
    return {f"{table}.{spec.name}": spec for table, cls in tables.items() for spec in fields_of(cls)}


def option_help() -> str:
    """Every field with its type, default and help, grouped by section, as text."""
    formatter = click.HelpFormatter(width=_WIDTH)
    for table, fields in groupby(builtin_fields().items(), key=lambda item: item[0].rpartition(".")[0]):
        with formatter.section(f"[{table}]"):
            formatter.write_dl([(f"--{key}", field_help(spec)) for key, spec in fields], col_max=42)
    return formatter.getvalue()


def complete(incomplete: str) -> list[CompletionItem]:
    """The fields as options that start with what was typed; none before the two dashes are there."""
    if not incomplete.startswith("--"):
        return []
    options = {f"--{key}": spec.doc for key, spec in builtin_fields().items()}
    return [CompletionItem(option, help=doc) for option, doc in options.items() if option.startswith(incomplete)]


def _complete_value(key: str, incomplete: str) -> list[CompletionItem]:
    """The values of a field that start with what was typed: choices, components, else files."""
    if (spec := builtin_fields().get(key)) is None:
        return []
    choices = [name for kind, home in CONFIG_KEY.items() if home == key for name in builtin_registry().names(kind)]
    found = [CompletionItem(word) for word in (*choices, *spec.type.choices) if word.startswith(incomplete)]
    return found or (
        [CompletionItem(incomplete, type="file")] if spec.type.accepts(str) or spec.type.accepts(Path) else []
    )


def complete_plugin(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of plugins, ``no:NAME``, or files."""
    names = list(usable(installed()))
    found = [word for word in (*names, *(f"no:{name}" for name in names)) if word.startswith(incomplete)]
    return [CompletionItem(word) for word in found] or [CompletionItem(incomplete, type="file")]


def _incomplete(args: list[str]) -> tuple[tuple[str, str] | None, list[str]]:
    """The field whose value is to be completed, with what of the word stands before it; and the complete words.

    Shells make one word of ``--key=value`` or three; of one word click passes on the value alone. ``no:NAME`` becomes
    three words, too.
    """
    words, position = split_arg_string(os.environ.get("COMP_WORDS", "")), os.environ.get("COMP_CWORD", "")
    word = "".join(words[int(position) : int(position) + 1]) if position.isdigit() else position
    if (found := OVERRIDE.fullmatch(word)) and found[2] is not None:
        return (field_key(found[1]), f"--{found[1]}="), args
    typed = [*args, word] if word == ":" else args
    if typed[-3:] == ["-p", "no", ":"]:
        return (_OFF, ""), typed[:-3]
    before = args[:-1] if args[-1:] == ["="] else args
    if before and (found := OVERRIDE.fullmatch(before[-1])) and found[2] is None:
        return (field_key(found[1]), ""), before[:-1]
    return None, args


def _meant(option: str) -> list[str]:
    """The fields that an unknown option may mean: those of that name without the section, else of a similar name."""
    name = option.lstrip("-").replace("-", "_")
    fields: dict[str, list[str]] = {}
    for key in builtin_fields():
        fields.setdefault(key.rpartition(".")[2], []).append(f"--{key}")
    return fields.get(name) or fields.get(closest(name, fields, cutoff=0.8) or "", [])
