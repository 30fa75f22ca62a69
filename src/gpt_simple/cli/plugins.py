"""List, inspect, check and make plugins.

``list`` reads package metadata and imports no plugin, so a broken one does not break it. With ``--config`` it shows
which plugins that run would load, why and in which order, which takes importing them.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from gpt_simple.cli.paths import PATH
from gpt_simple.cli.terminal import echo

SCHEMA = 1
"""Version of the JSON output; raised when a key changes its meaning or goes away."""


@click.group()
def plugins() -> None:
    """List, inspect, check and make plugins."""


@plugins.command("list")
@click.option("-c", "--config", "config", metavar="FILE", help="What a run of FILE would load, and why.")
@click.option("-p", "chosen", multiple=True, metavar="NAME", help="With --config: as for `run`.")
@click.option("--no-plugins", is_flag=True, help="With --config: as for `run`.")
@click.option("--external", is_flag=True, help="Only plugins of other packages.")
@click.option("--hooks", is_flag=True, help="All hooks; with --config, the plugins that implement them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def list_plugins(
    config: str | None, chosen: tuple[str, ...], no_plugins: bool, external: bool, hooks: bool, as_json: bool
) -> None:
    """Show the installed plugins. They are imported only if --config is given."""
    from gpt_simple.cli import plugin_listing as listing

    if config is not None:
        from gpt_simple.plugin_host.activation import Switches

        rows = listing.rows_of_run(config, Switches.parse(chosen, no_plugins=no_plugins))
    elif chosen or no_plugins:
        raise click.UsageError("-p and --no-plugins need --config: without one nothing is active")
    else:
        rows = listing.installed_rows()
    if external:
        rows = [row for row in rows if row["origin"] == "external"]
    if hooks:
        rows = listing.hook_rows(rows)
    if as_json:
        echo(json.dumps({"schema": SCHEMA, "hooks" if hooks else "plugins": rows}, indent=2))
    else:
        echo(listing.hook_table(rows) if hooks else listing.plugin_table(rows))


@plugins.command()
@click.argument("name")
def show(name: str) -> None:
    """Show the hooks and the configuration of plugin NAME (or of ./file.py), ready to paste."""
    from gpt_simple.cli.plugin_details import details

    echo(details(name))


@plugins.command()
@click.argument("name", required=False)
@click.option("--lint-only", is_flag=True, help="Do not train three steps with the plugin.")
def check(name: str | None, lint_only: bool) -> int:
    """Check plugin NAME (or ./file.py; without NAME all plugins of other packages): lint, then a run of three steps."""
    from gpt_simple.cli.plugin_check import check_plugins

    return check_plugins(name, smoke=not lint_only)


@plugins.command()
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(["logger", "model", "optimizer", "schedule", "source", "evaluation", "command"]),
    help="What it brings.  [default: logger]",
)
@click.option("--template", type=click.Choice(["logger", "component"]), hidden=True)
@click.option("--directory", metavar="DIR", type=PATH, default=".", help="Where the package's folder is made.")
def new(name: str, kind: str | None, template: str | None, directory: Path) -> None:
    """Make the installable package of a new plugin NAME."""
    from gpt_simple.cli.scaffold import scaffold

    if template is not None:
        former = {"component": "schedule"}.get(template, template)
        echo(f"--template is deprecated: use --kind {former}", err=True)
        kind = kind or former
    echo(scaffold(name, kind or "logger", directory))
