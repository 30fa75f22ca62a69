"""The rows of ``gpt-simple plugins list``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import asdict, evolve, frozen

from gpt_simple.config.load import RawConfig, read
from gpt_simple.errors import ConfigError, PluginError
from gpt_simple.hooks.activation import Decision, Switches, Wishes, decide
from gpt_simple.hooks.discovery import DEFAULT_ON, PluginRecord, installed, summary, usable
from gpt_simple.hooks.lint import hooks_of
from gpt_simple.hooks.loading import LoadedPlugin, load_file, load_plugin, ordered
from gpt_simple.hooks.specs import HOOKS, HookInfo, HookSpecs

SCHEMA = 1
"""Version of the JSON output; raised when a key changes its meaning or goes away."""

_STATUS_OF_PROBLEM = {"shadowed": "shadowed", "incompatible": "incompatible", "": ""}


@frozen
class PluginRow:
    """One line. ``status`` is active, default, available, disabled, broken, incompatible or shadowed.

    ``why`` explains it in a few words, ``order`` is the place in the call order of an active one, from 1.
    """

    name: str
    version: str
    package: str
    origin: str
    status: str
    why: str
    table: str
    summary: str
    order: int | None = None
    hooks: tuple[str, ...] | None = None


@frozen
class HookRow:
    """One hook; ``plugins`` implement it, in call order, where that is known."""

    name: str
    ranks: str
    returns: str
    event: str
    summary: str
    plugins: tuple[str, ...] | None = None


def survey() -> list[PluginRow]:
    """All installed plugins, from metadata."""
    return [_row(record) for record in installed()]


def survey_run(config: str, switches: Switches) -> list[PluginRow]:
    """All installed plugins as a run of ``config`` finds them; active ones first, in call order.

    A plugin that does not load is a row of status ``broken`` here: a run would stop and say the same.
    """
    raw = read(config)
    everything = installed()
    records = usable(everything)
    files = dict(load_file(path) for path in switches.files)
    decisions = decide(records, _wishes(raw), raw.is_set, switches, tuple(files))
    loaded: dict[str, LoadedPlugin] = {}
    broken: dict[str, str] = {}
    for name, decision in decisions.items():
        if decision.active:
            try:
                loaded[name] = load_plugin(name, files.get(name), records.get(name), decision.why)
            except PluginError as error:
                broken[name] = str(error)
    order = [plugin.name for plugin in ordered(loaded.values())]
    rows = [_row(record) for record in everything if record.problem == "shadowed"]
    for name, decision in decisions.items():
        row = _row(records[name]) if name in records else _file_row(name)
        rows.append(_decided(row, decision, loaded.get(name), broken.get(name, ""), order))
    return sorted(rows, key=lambda row: (row.order is None, row.order or 0, row.name, row.origin))


def hook_rows(plugins: Sequence[PluginRow]) -> list[HookRow]:
    """The catalogue; with the implementers if the plugins were loaded."""
    known = any(row.hooks is not None for row in plugins)
    return [_hook_row(info, plugins if known else None) for info in HOOKS.values()]


def as_json(row: PluginRow | HookRow) -> dict[str, Any]:
    return asdict(row)


def plugin_table(rows: Sequence[PluginRow]) -> str:
    """Aligned columns; on a terminal the summaries are cut to its width."""
    if not rows:
        return "no plugins"
    explained = any(row.order is not None for row in rows)
    columns: dict[str, Callable[[PluginRow], str]] = {
        "NAME": lambda row: row.name,
        "STATUS": lambda row: row.status,
        **({"WHY": lambda row: row.why} if explained else {}),
        "VERSION": lambda row: row.version,
        "PACKAGE": lambda row: row.package,
        "ORIGIN": lambda row: row.origin,
        "TABLE": lambda row: row.table,
        "SUMMARY": lambda row: row.summary,
    }
    text = _table(rows, columns)
    troubled = [f"{row.name}: {row.why}" for row in rows if row.status in ("broken", "incompatible", "shadowed")]
    return "\n".join([text, "", *troubled]) if troubled and not explained else text


def hook_table(rows: Sequence[HookRow]) -> str:
    listeners: dict[str, Callable[[HookRow], str]] = {"PLUGINS": lambda row: ", ".join(row.plugins or ()) or "-"}
    columns: dict[str, Callable[[HookRow], str]] = {
        "HOOK": lambda row: row.name,
        "RANKS": lambda row: row.ranks,
        "RETURNS": lambda row: row.returns,
        **(listeners if any(row.plugins is not None for row in rows) else {}),
        "WHEN": lambda row: row.summary,
    }
    return _table(rows, columns)


def _table(rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]) -> str:
    cells = [list(columns), *[[cell(row) for cell in columns.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join(lines)


def _row(record: PluginRecord) -> PluginRow:
    on = record.origin == "builtin" and record.name in DEFAULT_ON
    status = _STATUS_OF_PROBLEM.get(record.problem, "broken") or ("default" if on else "available")
    return PluginRow(
        record.name,
        record.version,
        record.distribution,
        record.origin,
        status,
        record.detail,
        f"[plugins.{record.name}]",
        summary(record),
    )


def _file_row(name: str) -> PluginRow:
    return PluginRow(name, "", "", "file", "available", "", f"[plugins.{name}]", "")


def _decided(
    row: PluginRow, decision: Decision, loaded: LoadedPlugin | None, mistake: str, order: list[str]
) -> PluginRow:
    if mistake:
        return evolve(row, status="incompatible" if row.status == "incompatible" else "broken", why=mistake)
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


def _wishes(raw: RawConfig) -> Wishes:
    table = raw.values.get("plugins") or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"{raw.origins.place('plugins')}: expected a table")
    return Wishes.read(table, raw.origins.place)
