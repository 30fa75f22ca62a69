"""``gpt-simple plugins check``: the lint, then the contract suite on a tiny run, without a test runner."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

from gpt_simple._names import PROGRAM
from gpt_simple.cli.plugin_details import find
from gpt_simple.cli.terminal import announced, echo
from gpt_simple.config.types import fields_of
from gpt_simple.errors import ExitCode, PluginError
from gpt_simple.hooks.components import BUILTIN, builtin_registry
from gpt_simple.plugin_host.activation import is_file
from gpt_simple.plugin_host.discovery import installed, usable
from gpt_simple.plugin_host.loading import LoadedPlugin


def check_plugins(name: str | None, *, smoke: bool) -> int:
    """Print one line for each plugin, and one for each mistake. Returns the exit code."""
    names = [name] if name else [key for key, record in usable(installed()).items() if record.origin == "external"]
    if not names:
        echo(f"no plugin of another package is installed; `{PROGRAM} plugins check NAME` checks a built-in one")
    failed = [each for each in names if not _check(each, smoke=smoke)]
    return ExitCode.PLUGIN if failed else ExitCode.COMPLETED


def _check(name: str, *, smoke: bool) -> bool:
    untried: list[str] = []
    try:
        plugin, _ = find(name)
        _pair(plugin)
        if smoke:
            with announced(f"checking {name} with tiny runs"), redirect_stdout(io.StringIO()):
                from gpt_simple.testing.contract import violations  # only now: the lint alone does not need torch

                # The plugin may be meant to change training.
                found = violations(plugin.cls, enable=() if is_file(name) else (name,), observes=False)
            if found.broken:
                raise AssertionError("\n".join(f"- {text}" for text in found.broken))
            untried = found.untried
    except (PluginError, AssertionError) as error:
        echo(f"{name}: broken\n{error}")
        return False
    echo("\n".join([f"{name}: ok ({'lint and tiny runs' if smoke else 'lint'})", *untried]))
    return True


def _pair(plugin: LoadedPlugin) -> None:
    """Raise PluginError for an optimizer that could not be used with its own default schedule."""
    plugin.register_components(registry := builtin_registry())
    for part in registry.parts.values():
        if part.owner != BUILTIN and part.kind == "optimizer" and part.config is not None:
            schedule = next(spec.default for spec in fields_of(part.config) if spec.name == "schedule")
            if schedule in registry.names("schedule"):
                registry.pair(part.name, schedule)
