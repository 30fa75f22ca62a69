"""Show what a run would really use and where each value comes from; a schema for editors."""

from __future__ import annotations

import json
from typing import Any

import click

from gpt_simple.cli.fields import ConfigRequest, ConfiguredCommand, builtin_configs, plugin_options
from gpt_simple.cli.terminal import echo
from gpt_simple.config.render import tables, to_json, to_toml
from gpt_simple.config.structure import SECTIONS
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.spec import RunSpec, resolve_spec


@click.group()
def config() -> None:
    """Show the configuration, and a schema for editors."""


@config.command(cls=ConfiguredCommand)
@click.option("--origin", is_flag=True, help="Say where each value comes from, and what it overrode.")
@click.option("--json", "as_json", is_flag=True, help="JSON.")
@click.option("--toml", "as_toml", is_flag=True, help="TOML; the default.")
def show(request: ConfigRequest, origin: bool, as_json: bool, as_toml: bool) -> None:
    """Print every value that a run of CONFIG would use."""
    if as_json and as_toml:
        raise click.UsageError("choose one of --json and --toml")
    spec = request.resolve()
    for note in spec.notes:
        echo(f"note: {note}", err=True)
    if not as_json:
        echo(to_toml(spec.config, comments=False, origins=spec.origins if origin else None), nl=False)
    elif not origin:
        echo(to_json(spec.config), nl=False)
    else:
        echo(json.dumps(_with_origins(spec), indent=2))


@config.command(params=plugin_options())
@click.option(
    "-c", "--config", "path", metavar="FILE", type=click.Path(), help="Include the plugins and components of FILE."
)
def schema(path: str | None, plugins: tuple[str, ...], no_plugins: bool) -> None:
    """Print a JSON Schema (draft-07) of the configuration.

    It has the fields of the core and of the built-in plugins; with -c or -p also what other plugins bring.
    Save it and name it in the first line of a configuration: `#:schema schema.json` in TOML,
    `# yaml-language-server: $schema=schema.json` in YAML.
    """
    from gpt_simple.config.json_schema import json_schema

    plugin_configs, sections = builtin_configs(), dict(SECTIONS)
    if path is not None or plugins:
        spec = resolve_spec(path, switches=Switches.parse(plugins, no_plugins=no_plugins))
        plugin_configs |= spec.host.config_classes()
        plugin_configs |= {plugin.name: plugin.cls.Config for plugin in spec.host.plugins}
        sections = {name: type(getattr(spec.config, name)) for name in SECTIONS}
    echo(json.dumps(json_schema(plugin_configs, sections=sections), indent=2))


def _with_origins(spec: RunSpec) -> dict[str, Any]:
    """Dotted key -> value and the places that set it, strongest first."""
    values = {entry.path: entry.value for table in tables(spec.config, False) for entry in table.entries}
    return {
        key: {"value": value, "kind": spec.origins.of(key).kind, "places": spec.origins.chain(key)}
        for key, value in values.items()
    }
