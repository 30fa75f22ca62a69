"""The text of ``gpt-simple plugins show NAME``: the hooks of a plugin, and its configuration ready to paste."""

from __future__ import annotations

import json
from collections.abc import Iterator

from gpt_simple.config.frozen import json_value
from gpt_simple.config.render import toml_text
from gpt_simple.config.types import fields_of
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.components import CONFIG_KEY, Registry
from gpt_simple.hooks.specs import HOOKS
from gpt_simple.plugin_host.activation import is_file, unknown_plugin
from gpt_simple.plugin_host.discovery import DEFAULT_ON, ENABLED_BY, PluginRecord, installed, summary, usable
from gpt_simple.plugin_host.lint import hooks_of
from gpt_simple.plugin_host.loading import LoadedPlugin, load_file, load_plugin


def find(name: str) -> tuple[LoadedPlugin, PluginRecord | None]:
    """The plugin of an entry point or of a file, imported and linted. ConfigError if the name is unknown."""
    if is_file(name):
        own_name, cls = load_file(name)
        return load_plugin(own_name, cls, None), None
    records = usable(installed())
    if (record := records.get(name)) is None:
        raise ConfigError(unknown_plugin(name, records))
    return load_plugin(name, None, record), record


def details(name: str) -> str:
    """The facts of a plugin, its hooks and components, and its configuration as TOML."""
    plugin, record = find(name)
    return "\n".join([*_head(plugin, record), "", *_hooks(plugin), *_parts(plugin), "", *_configuration(plugin)])


def _head(plugin: LoadedPlugin, record: PluginRecord | None) -> Iterator[str]:
    yield f"{plugin.name}: {_summary(plugin, record)}"
    if plugin.distribution:
        yield f"  package   {plugin.distribution} {plugin.version}"
    yield f"  file      {plugin.file}"
    yield f"  runs on   {'the main process' if plugin.ranks == 'main' else 'every process'}"
    policy = "ends the run" if plugin.on_error == "abort" else "switches the plugin off, with one warning"
    yield f"  failure   {policy}"
    for relation in ("before", "after", "requires", "uses"):
        if names := getattr(plugin.cls, relation):
            yield f"  {relation:<9} {', '.join(names)}"
    if missing := [name for name in plugin.cls.requires if name not in usable(installed())]:
        yield f"  missing   {', '.join(missing)} (not installed)"
    if plugin.cls.state_required:
        yield "  state     a checkpoint made with it needs it"
    yield f"  active    {_activation(plugin, record)}"


def _hooks(plugin: LoadedPlugin) -> Iterator[str]:
    yield "hooks"
    for hook in hooks_of(plugin.cls):
        info = HOOKS[hook]
        ranks = plugin.ranks if info.ranks == "plugin" else info.ranks
        where = "main process" if ranks == "main" else "every process"
        yield f"  {hook:<22} {where}{'' if info.returns == 'none' else f', returns {info.returns}'}"


def _parts(plugin: LoadedPlugin) -> Iterator[str]:
    registry = Registry()
    if "register_components" in hooks_of(plugin.cls):
        plugin.register_components(registry)
        yield ""
        yield "components"
    for part in registry.parts.values():
        yield f"  {part.kind:<10} {part.name:<20} chosen by {CONFIG_KEY[part.kind]} = {json.dumps(part.name)}"


def _configuration(plugin: LoadedPlugin) -> Iterator[str]:
    fields = fields_of(plugin.cls.Config)
    yield f"[plugins.{plugin.name}]" + ("" if fields else "  # nothing to configure")
    for field in fields:
        if field.doc:
            yield f"# {field.doc}"
        # TOML has no null: a key that is unset by default is shown as a comment.
        default = "..." if field.default is None else toml_text(json_value(field.default))
        yield f"{'# ' if field.default is None else ''}{field.name} = {default}  # {field.type.description}"


def _summary(plugin: LoadedPlugin, record: PluginRecord | None) -> str:
    own = (plugin.cls.__doc__ or "").strip().partition("\n")[0]
    return (summary(record) if record else "") or own or "no description"


def _activation(plugin: LoadedPlugin, record: PluginRecord | None) -> str:
    name = plugin.name
    if record is None:
        return f"with -p {plugin.file}"
    if record.origin == "builtin":
        if name in ENABLED_BY:
            return f"when {ENABLED_BY[name]} is set"
        if name in DEFAULT_ON:
            return f"by default; off with -p no:{name} or in [plugins] disable"
    return f"with a table [plugins.{name}] in the configuration, or with -p {name}"
