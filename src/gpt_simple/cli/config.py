"""Show what a run would really use and where each value comes from; a schema for editors."""

from __future__ import annotations

import json
from typing import Any

import click

from gpt_simple.cli.fields import ConfiguredCommand, pass_overrides, plugins_option

_PLUGINS = plugins_option("As for `run`.")
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_SETTINGS)
def config() -> None:
    """Show the configuration, and a schema for editors."""


@config.command("show", cls=ConfiguredCommand)
@click.argument("path", metavar="[CONFIG]", type=click.Path(), required=False)
@click.option("-c", "--config", "option", metavar="FILE", type=click.Path(), help="The same as CONFIG.")
@click.option("--origin", is_flag=True, help="Say where each value comes from, and what it overrode.")
@click.option("--json", "as_json", is_flag=True, help="JSON.")
@click.option("--toml", "as_toml", is_flag=True, help="TOML; the default.")
@_PLUGINS
@click.option("--no-plugins", is_flag=True, help="As for `run`.")
@pass_overrides
def show(
    overrides: list[tuple[str, str]],
    path: str | None,
    option: str | None,
    origin: bool,
    as_json: bool,
    as_toml: bool,
    plugins: tuple[str, ...],
    no_plugins: bool,
) -> None:
    """Print every value that a run of CONFIG would use."""
    from gpt_simple.config.render import to_json, to_toml
    from gpt_simple.plugin_host.activation import Switches
    from gpt_simple.spec import resolve_spec

    if path and option and path != option:
        raise click.UsageError(f"two configurations were given: {path} and --config {option}")
    if as_json and as_toml:
        raise click.UsageError("choose one of --json and --toml")
    switches = Switches.parse(plugins, no_plugins=no_plugins)
    spec = resolve_spec(path or option, overrides=overrides, switches=switches)
    for note in spec.notes:
        click.echo(f"note: {note}", err=True)
    if not as_json:
        click.echo(to_toml(spec.config, comments=False, origins=spec.origins if origin else None), nl=False)
    elif not origin:
        click.echo(to_json(spec.config), nl=False)
    else:
        click.echo(json.dumps(_with_origins(spec), indent=2, ensure_ascii=False))


@config.command("schema")
@click.option(
    "-c", "--config", "path", metavar="FILE", type=click.Path(), help="Include the plugins and components of FILE."
)
@_PLUGINS
@click.option("--no-plugins", is_flag=True, help="As for `run`.")
def schema(path: str | None, plugins: tuple[str, ...], no_plugins: bool) -> None:
    """Print a JSON Schema (draft-07) of the configuration.

    It has the fields of the core and of the built-in plugins; with -c or -p also what other plugins bring.
    Save it and name it in the first line of a configuration: `#:schema schema.json` in TOML,
    `# yaml-language-server: $schema=schema.json` in YAML.
    """
    from gpt_simple.cli.fields import builtin_configs
    from gpt_simple.config.json_schema import json_schema
    from gpt_simple.config.structure import SECTIONS
    from gpt_simple.plugin_host.activation import Switches
    from gpt_simple.spec import resolve_spec

    tables, sections = builtin_configs(), dict(SECTIONS)
    if path is not None or plugins:
        spec = resolve_spec(path, switches=Switches.parse(plugins))
        tables |= spec.host.config_classes()
        tables |= {plugin.name: plugin.cls.Config for plugin in spec.host.plugins}
        sections = {name: type(getattr(spec.config, name)) for name in SECTIONS}
    click.echo(json.dumps(json_schema(tables, sections=sections), indent=2, ensure_ascii=False))


def _with_origins(spec: Any) -> dict[str, Any]:
    """Dotted key -> value and the places that set it, strongest first."""
    from gpt_simple.config.frozen import json_value
    from gpt_simple.config.structure import SWITCHES

    found: dict[str, Any] = {}
    for section, values in json_value(spec.config).items():
        for key, value in values.items():
            if section == "plugins" and key not in SWITCHES:
                found |= {f"plugins.{key}.{inner}": item for inner, item in value.items()}
            else:
                found[f"{section}.{key}"] = value
    return {
        path: {"value": value, "kind": spec.origins.of(path).kind, "places": spec.origins.chain(path)}
        for path, value in found.items()
    }
