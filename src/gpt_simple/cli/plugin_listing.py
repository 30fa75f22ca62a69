"""The rows of ``gpt-simple plugins list``, and how they are shown.

Without a configuration they come from package metadata alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from gpt_simple.errors import ConfigError, GptSimpleError, raise_all
from gpt_simple.plugin_host.discovery import DEFAULT_ON, PluginRecord, installed, summary, usable

if TYPE_CHECKING:
    from gpt_simple.plugin_host.activation import Switches
    from gpt_simple.plugin_host.host import PluginHost

_UNUSABLE = ("broken", "incompatible", "shadowed")


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


def installed_rows() -> list[PluginRow]:
    """All installed plugins, from metadata."""
    return [_row(record) for record in installed()]


def rows_of_run(config: str, switches: Switches) -> list[PluginRow]:
    """All installed plugins as a run of ``config`` finds them; active ones first, in call order.

    A plugin that does not load is a row of status ``broken``; a run would stop with the same message.
    """
    from gpt_simple.config.load import read
    from gpt_simple.plugin_host.host import PluginHost

    raw = read(config)
    table = raw.values.get("plugins") or {}
    if not isinstance(table, Mapping):
        raise ConfigError("expected a table", key="plugins")
    errors: list[GptSimpleError] = []
    host = PluginHost.activate(table, set_keys=raw.is_set, switches=switches, errors=errors)
    others = [error for error in errors if error not in host.failures.values()]
    raise_all([error.replace_problems(map(raw.origins.locate, error.problems)) for error in others])
    everything = installed()
    records = usable(everything)
    rows = [_row(record) for record in everything if record is not records.get(record.name)]
    for name in host.decisions:
        file = PluginRow(name, "", "", "file", "available", "", f"[plugins.{name}]", "")
        rows.append(_decided(_row(records[name]) if name in records else file, host))
    return sorted(rows, key=lambda row: (row.order is None, row.order or 0, row.name, row.origin))


def hook_rows(plugins: Sequence[PluginRow]) -> list[HookRow]:
    """The catalogue of hooks; with the implementers if the plugins were loaded."""
    from gpt_simple.hooks.specs import HOOKS, HookSpecs

    rows = []
    for info in HOOKS.values():
        doc = (getattr(HookSpecs, info.name).__doc__ or "").partition("\n")[0].rstrip(":. ").replace("``", "")
        row = HookRow(info.name, info.ranks, info.returns, info.event.__name__ if info.event else "", doc)
        if any(plugin.hooks is not None for plugin in plugins):
            names = tuple(plugin.name for plugin in plugins if info.name in (plugin.hooks or ()))
            row = evolve(row, plugins=names[::-1] if info.order == "reverse" else names)
        rows.append(row)
    return rows


def plugin_table(rows: Sequence[PluginRow]) -> str:
    """Aligned columns; on a terminal the summaries are cut to its width."""
    if not rows:
        return "no plugins"
    unusable = [row for row in rows if row.status in _UNUSABLE]
    why = {"WHY": ["see below" if row in unusable else row.why for row in rows]}
    text = _table(
        {
            "NAME": [row.name for row in rows],
            "STATUS": [row.status for row in rows],
            **(why if any(row.order is not None for row in rows) else {}),
            "VERSION": [row.version for row in rows],
            "PACKAGE": [row.package for row in rows],
            "ORIGIN": [row.origin for row in rows],
            "TABLE": [row.table for row in rows],
            "SUMMARY": [row.summary for row in rows],
        }
    )
    mistakes = [f"{row.name}: {line}" for row in unusable for line in row.why.splitlines()]
    return "\n".join([text, "", *dict.fromkeys(mistakes)]) if mistakes else text


def hook_table(rows: Sequence[HookRow]) -> str:
    """Aligned columns."""
    plugins = {"PLUGINS": [", ".join(row.plugins or ()) or "-" for row in rows]}
    return _table(
        {
            "HOOK": [row.name for row in rows],
            "RANKS": [row.ranks for row in rows],
            "RETURNS": [row.returns for row in rows],
            **(plugins if any(row.plugins is not None for row in rows) else {}),
            "WHEN": [row.summary for row in rows],
        }
    )


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    padded = []
    for head, cells in columns.items():
        width = max(map(len, (head, *cells)))
        padded.append([cell.ljust(width) for cell in (head, *cells)])
    lines = ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join(lines)


def _row(record: PluginRecord) -> PluginRow:
    """A plugin as its metadata describe it."""
    status = "default" if record.origin == "builtin" and record.name in DEFAULT_ON else "available"
    if record.problem:
        status = record.problem if record.problem in _UNUSABLE else "broken"
    return PluginRow(
        name=record.name,
        version=record.version,
        package=record.distribution,
        origin=record.origin,
        status=status,
        why=record.detail,
        table=f"[plugins.{record.name}]",
        summary=summary(record),
    )


def _decided(row: PluginRow, host: PluginHost) -> PluginRow:
    """The row of a plugin that the run can choose, with what the host decided."""
    from gpt_simple.plugin_host.lint import hooks_of

    why = host.decisions[row.name].why
    if (failure := host.failures.get(row.name)) is not None:
        return evolve(row, status=row.status if row.status in _UNUSABLE else "broken", why=str(failure))
    for order, plugin in enumerate(host.plugins, 1):
        if plugin.name == row.name:
            return evolve(row, status="active", why=why, order=order, hooks=tuple(hooks_of(plugin.cls)))
    if row.status in _UNUSABLE:
        return row
    return evolve(row, status="available" if why == "not asked for" else "disabled", why=why)
