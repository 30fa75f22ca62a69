"""The rows of ``gpt-simple plugins list``, and how they are shown. Needs metadata only."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import asdict, frozen

from gpt_simple.plugin_host.discovery import DEFAULT_ON, PluginRecord, installed, summary

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
    return [row_of(record) for record in installed()]


def as_json(row: PluginRow | HookRow) -> dict[str, Any]:
    return asdict(row)


def plugin_table(rows: Sequence[PluginRow]) -> str:
    """Aligned columns; on a terminal the summaries are cut to its width."""
    if not rows:
        return "no plugins"
    troubled = [row for row in rows if row.status in ("broken", "incompatible", "shadowed")]
    explained = any(row.order is not None for row in rows)
    columns: dict[str, Callable[[PluginRow], str]] = {
        "NAME": lambda row: row.name,
        "STATUS": lambda row: row.status,
        **({"WHY": lambda row: "told below" if row in troubled else row.why} if explained else {}),
        "VERSION": lambda row: row.version,
        "PACKAGE": lambda row: row.package,
        "ORIGIN": lambda row: row.origin,
        "TABLE": lambda row: row.table,
        "SUMMARY": lambda row: row.summary,
    }
    text = _table(rows, columns)
    mistakes = [f"{row.name}: {line}" for row in troubled for line in row.why.splitlines()]
    return "\n".join([text, "", *dict.fromkeys(mistakes)]) if mistakes else text


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


def row_of(record: PluginRecord) -> PluginRow:
    """What metadata say of a plugin."""
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
