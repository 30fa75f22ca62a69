"""What a run of a configuration would load, why and in which order: ``gpt-simple plugins list --config FILE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import evolve

from gpt_simple.cli.plugin_listing import HookRow, PluginRow, row_of
from gpt_simple.config.load import RawConfig, read
from gpt_simple.errors import ConfigError, PluginError
from gpt_simple.hooks.specs import HOOKS, HookInfo, HookSpecs
from gpt_simple.plugin_host.activation import Decision, PluginsTable, Switches, decide
from gpt_simple.plugin_host.discovery import installed, usable
from gpt_simple.plugin_host.lint import hooks_of
from gpt_simple.plugin_host.loading import LoadedPlugin, load_file, load_plugin, ordered


def survey_run(config: str, switches: Switches) -> list[PluginRow]:
    """All installed plugins as a run of ``config`` finds them; active ones first, in call order.

    A plugin that does not load is a row of status ``broken`` here: a run would stop and say the same.
    """
    raw = read(config)
    everything = installed()
    records = usable(everything)
    files = dict(load_file(path) for path in switches.files)
    try:
        decisions = decide(records, _plugins_table(raw), raw.is_set, switches, tuple(files))
    except ConfigError as error:
        error.replace_problems(map(raw.origins.locate, error.problems))
        raise
    loaded: dict[str, LoadedPlugin] = {}
    broken: dict[str, str] = {}
    for name, decision in decisions.items():
        if decision.active:
            try:
                loaded[name] = load_plugin(name, files.get(name), records.get(name), decision.why)
            except PluginError as error:
                broken[name] = str(error)
    order = [plugin.name for plugin in ordered(loaded.values())]
    rows = [row_of(record) for record in everything if record is not records.get(record.name)]
    for name, decision in decisions.items():
        row = row_of(records[name]) if name in records else _row_of_file(name)
        rows.append(_decided(row, decision, loaded.get(name), broken.get(name, ""), order))
    return sorted(rows, key=lambda row: (row.order is None, row.order or 0, row.name, row.origin))


def hook_rows(plugins: Sequence[PluginRow]) -> list[HookRow]:
    """The catalogue; with the implementers if the plugins were loaded."""
    known = any(row.hooks is not None for row in plugins)
    return [_hook_row(info, plugins if known else None) for info in HOOKS.values()]


def _row_of_file(name: str) -> PluginRow:
    return PluginRow(name, "", "", "file", "available", "", f"[plugins.{name}]", "")


def _decided(
    row: PluginRow, decision: Decision, loaded: LoadedPlugin | None, mistake: str, order: list[str]
) -> PluginRow:
    if mistake:
        return evolve(row, status="incompatible" if row.status == "incompatible" else "broken", why=mistake)
    if loaded is None and row.status in ("broken", "incompatible"):
        return row
    if loaded is None:
        switched_off = decision.why != "not asked for"
        return evolve(row, status="disabled" if switched_off else "available", why=decision.why)
    hooks = tuple(hooks_of(loaded.cls))
    return evolve(row, status="active", why=decision.why, order=order.index(row.name) + 1, hooks=hooks)


def _hook_row(info: HookInfo, plugins: Sequence[PluginRow] | None) -> HookRow:
    summary_line = (getattr(HookSpecs, info.name).__doc__ or "").partition("\n")[0].rstrip(":. ").replace("``", "")
    event = info.event.__name__ if info.event else ""
    names = None if plugins is None else [row.name for row in plugins if row.hooks and info.name in row.hooks]
    if names and info.order == "reverse":
        names.reverse()
    return HookRow(info.name, info.ranks, info.returns, event, summary_line, None if names is None else tuple(names))


def _plugins_table(raw: RawConfig) -> PluginsTable:
    table = raw.values.get("plugins") or {}
    if not isinstance(table, Mapping):
        raise ConfigError("expected a table", key="plugins")
    return PluginsTable.read(table)
