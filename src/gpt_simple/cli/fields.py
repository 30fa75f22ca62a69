"""The fields of the configuration as command-line options: parsing, help and completion, all from the schema."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem, split_arg_string

from gpt_simple.config.load import OVERRIDE, split_overrides
from gpt_simple.config.mistakes import closest
from gpt_simple.config.render import field_help
from gpt_simple.config.schema import PluginsConfig
from gpt_simple.config.structure import SECTIONS
from gpt_simple.config.types import FieldSpec, fields_of
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.components import CONFIG_KEY, builtin_registry
from gpt_simple.plugin_host.discovery import installed, usable

_WIDTH = 110
_AWAITED = "gpt_simple.awaited"
_OFF = "-p no:"

OVERRIDES = "gpt_simple.overrides"
pass_overrides = click.decorators.pass_meta_key(OVERRIDES, doc_description="the overrides of the configuration")


class ConfiguredCommand(click.Command):
    """A command that also takes every field of the configuration as ``--section.key value``.

    They are left in ``context.meta[OVERRIDES]`` as (dotted key, text) pairs, in their order.
    """

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        awaited, args = _awaited(args) if context.resilient_parsing else (None, args)
        try:
            context.meta[OVERRIDES], rest = split_overrides(args)
        except ConfigError:
            if not context.resilient_parsing:
                raise
            context.meta[OVERRIDES], rest = [], []
        try:
            left = super().parse_args(context, rest)
        except click.NoSuchOption as error:
            if not (meant := _meant(error.option_name)):
                raise
            message = f"there is no option {error.option_name}; did you mean {' or '.join(meant)}?"
            raise click.UsageError(message, error.ctx) from None
        if awaited is not None:
            context.meta[_AWAITED] = awaited
            # Else click would complete the argument CONFIG, if it is not there, and not ask this command.
            for parameter in self.params:
                context.set_parameter_source(str(parameter.name), ParameterSource.COMMANDLINE)
        return left

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(context, formatter)
        formatter.write("\n" + option_help(builtin_configs()))

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        key, before = context.meta.get(_AWAITED, ("", ""))
        if key == _OFF:
            return [CompletionItem(name) for name in usable(installed()) if name.startswith(incomplete.lstrip(":"))]
        if key and not incomplete.startswith("--"):
            found = complete_value(key, incomplete, builtin_configs())
            return [CompletionItem(before + item.value, item.type) for item in found]
        return [*super().shell_complete(context, incomplete), *complete(incomplete, builtin_configs())]


def _awaited(args: list[str]) -> tuple[tuple[str, str] | None, list[str]]:
    """The field whose value a shell asks for, with what of the word stands before it; and the words that are complete.

    Shells make one word of ``--key=value`` or three. Of one word click hands on the value alone. ``no:NAME`` becomes
    three words, too.
    """
    words, position = split_arg_string(os.environ.get("COMP_WORDS", "")), os.environ.get("COMP_CWORD", "")
    word = "".join(words[int(position) : int(position) + 1]) if position.isdigit() else position
    if (found := OVERRIDE.fullmatch(word)) and found[2] is not None:
        return (found[1], f"--{found[1]}="), args
    typed = [*args, word] if word == ":" else args
    if typed[-3:] == ["-p", "no", ":"]:
        return (_OFF, ""), typed[:-3]
    before = args[:-1] if args[-1:] == ["="] else args
    if before and (found := OVERRIDE.fullmatch(before[-1])) and found[2] is None:
        return (found[1], ""), before[:-1]
    return None, args


def _meant(option: str) -> list[str]:
    """The fields that an unknown option may be: those of that name without the section, else of a name like it."""
    key = option.lstrip("-").replace("-", "_")
    fields: dict[str, list[str]] = {}
    for item in complete("--", builtin_configs()):
        fields.setdefault(item.value.rpartition(".")[2], []).append(item.value)
    return fields.get(key) or fields.get(closest(key, fields, cutoff=0.8) or "", [])


def plugins_option(help: str) -> Callable[[Any], Any]:
    """``-p``, which completes the names of plugins and files."""
    return click.option("-p", "plugins", multiple=True, metavar="NAME", help=help, shell_complete=_complete_plugin)


def _complete_plugin(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = list(usable(installed()))
    found = [word for word in (*names, *(f"no:{name}" for name in names)) if word.startswith(incomplete)]
    return [CompletionItem(word) for word in found] or [CompletionItem(incomplete, type="file")]


def builtin_configs() -> dict[str, type]:
    """Built-in plugin -> its config class."""
    from gpt_simple.plugin_host.activation import Switches
    from gpt_simple.plugin_host.host import PluginHost

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


def complete_value(key: str, incomplete: str, plugin_configs: Mapping[str, type]) -> list[CompletionItem]:
    """What a dotted key may be, as far as it starts with what was typed: a choice, a component, else a file."""
    types = {f"{table}.{spec.name}": spec.type for table, specs in _groups(plugin_configs) for spec in specs}
    if key not in types:
        return []
    choices = [name for kind, home in CONFIG_KEY.items() if home == key for name in builtin_registry().names(kind)]
    choices += types[key].choices
    found = [CompletionItem(choice) for choice in choices if choice.startswith(incomplete)]
    return found or ([CompletionItem(incomplete, type="file")] if types[key].accepts(str) else [])


def _groups(plugin_configs: Mapping[str, type]) -> Iterator[tuple[str, tuple[FieldSpec, ...]]]:
    plugins = {f"plugins.{name}": cls for name, cls in plugin_configs.items()}
    for table, cls in {**SECTIONS, "plugins": PluginsConfig, **plugins}.items():
        if specs := fields_of(cls):
            yield table, specs
