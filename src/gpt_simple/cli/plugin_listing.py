"""The rows of ``gpt-simple plugins list``, and how they are shown.

Without a configuration they come from package metadata alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt_simple.errors import ConfigError, GptSimpleError, raise_all
from gpt_simple.plugin_host.discovery import DEFAULT_ON, PluginRecord, installed, summary, usable

if TYPE_CHECKING:
    from gpt_simple.plugin_host.activation import Switches
    from gpt_simple.plugin_host.host import PluginHost

_UNUSABLE = ("broken", "incompatible", "shadowed")


Row = dict[str, Any]
"""One line of a list, and one object of its JSON form.

Of a plugin: name, version, package, origin, status (active, default, available, disabled, broken, incompatible or
shadowed), why (explains the status in a few words), table, summary, order (the place in the call order of an active
plugin, from 1) and hooks. Of a hook: name, ranks, returns, event, summary, and plugins, which implement it in call
order. What is unknown without a configuration is None.
"""


def installed_rows() -> list[Row]:
    """All installed plugins, from metadata."""
    return [_row(record) for record in installed()]


def rows_of_run(config: str, switches: Switches) -> list[Row]:
    """All installed plugins as a run of ``config`` finds them; active ones first, in call order.

    A plugin that does not load is a row of status ``broken``; a run would stop with the same message.
    """
    from gpt_simple.plugin_host.host import PluginHost
    from gpt_simple.run_config import read_config

    raw = read_config(config)
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
    files = [
        _row(PluginRecord(name, "", "", "", "external")) | {"origin": "file"}
        for name in host.decisions
        if name not in records
    ]
    rows += [_decided(row, host) for row in (*map(_row, records.values()), *files)]
    return sorted(rows, key=lambda row: (row["order"] is None, row["order"], row["name"], row["origin"]))


def hook_rows(plugins: Sequence[Row]) -> list[Row]:
    """The catalogue of hooks; with the implementers if the plugins were loaded."""
    from gpt_simple.hooks.specs import HOOKS, HookSpecs

    rows = []
    for hook in HOOKS.values():
        doc = getattr(HookSpecs, hook.name).__doc__ or ""
        names = None
        if any(plugin["hooks"] is not None for plugin in plugins):
            names = [plugin["name"] for plugin in plugins if hook.name in (plugin["hooks"] or ())]
            names = names[::-1] if hook.order == "reverse" else names
        rows.append(
            {
                "name": hook.name,
                "ranks": hook.ranks,
                "returns": hook.returns,
                "event": hook.event.__name__ if hook.event else "",
                "summary": doc.partition("\n")[0].rstrip(":. ").replace("``", ""),
                "plugins": names,
            }
        )
    return rows


def plugin_table(rows: Sequence[Row]) -> str:
    """Aligned columns; on a terminal the summaries are cut to its width."""
    if not rows:
        return "no plugins"
    unusable = [row for row in rows if row["status"] in _UNUSABLE]
    why = ["why"] if any(row["order"] is not None for row in rows) else []
    columns = ["name", "status", *why, "version", "package", "origin", "table", "summary"]
    shown = [row | {"why": "see below"} if row in unusable else row for row in rows]
    text = _table(shown, {column.upper(): column for column in columns})
    mistakes = [f"{row['name']}: {line}" for row in unusable for line in row["why"].splitlines()]
    return "\n".join([text, "", *dict.fromkeys(mistakes)]) if mistakes else text


def hook_table(rows: Sequence[Row]) -> str:
    """Aligned columns."""
    plugins = {"PLUGINS": "plugins"} if any(row["plugins"] is not None for row in rows) else {}
    shown = [row | {"plugins": ", ".join(row["plugins"] or ()) or "-"} for row in rows]
    return _table(shown, {"HOOK": "name", "RANKS": "ranks", "RETURNS": "returns", **plugins, "WHEN": "summary"})


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A line for each row; ``columns`` maps the head of a column to its key."""
    cells = [list(columns), *([row[key] for key in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join(lines)


def _row(record: PluginRecord) -> Row:
    """A plugin as its metadata describe it."""
    status = "default" if record.origin == "builtin" and record.name in DEFAULT_ON else "available"
    if record.problem:
        status = record.problem if record.problem in _UNUSABLE else "broken"
    return {
        "name": record.name,
        "version": record.version,
        "package": record.distribution,
        "origin": record.origin,
        "status": status,
        "why": record.detail,
        "table": f"[plugins.{record.name}]",
        "summary": summary(record),
        "order": None,
        "hooks": None,
    }


def _decided(row: Row, host: PluginHost) -> Row:
    """The row of a plugin that the run can choose, with what the host decided."""
    from gpt_simple.plugin_host.lint import hooks_of

    why = host.decisions[row["name"]].why
    if (failure := host.failures.get(row["name"])) is not None:
        return row | {"status": row["status"] if row["status"] in _UNUSABLE else "broken", "why": str(failure)}
    for order, plugin in enumerate(host.plugins, 1):
        if plugin.name == row["name"]:
            return row | {"status": "active", "why": why, "order": order, "hooks": hooks_of(plugin.cls)}
    if row["status"] in _UNUSABLE:
        return row
    return row | {"status": "available" if why == "not asked for" else "disabled", "why": why}
