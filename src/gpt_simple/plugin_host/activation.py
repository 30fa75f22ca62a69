"""Which plugins a run has, and why. Installed is not active.

Later wins: on by default < a table ``[plugins.NAME]`` < ``[plugins] disable`` < ``--no-plugins`` (which leaves the
built-in ones) < ``-p``. Nothing is imported here. All mistakes in the names are reported at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from gpt_simple._names import PROGRAM
from gpt_simple.errors import ConfigError, GptSimpleError, Problem
from gpt_simple.plugin_host.discovery import DEFAULT_ON, ENABLED_BY, RESERVED, PluginRecord


@frozen
class Switches:
    """The options about plugins on the command line."""

    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    no_plugins: bool = False

    @classmethod
    def parse(cls, values: Iterable[str], *, no_plugins: bool = False) -> Switches:
        """From the values of ``-p``: ``NAME``, ``no:NAME``, ``./file.py``. The last value for a name counts."""
        state: dict[str, bool] = {}
        for value in values:
            state.pop(name := value.removeprefix("no:"), None)
            state[name] = name == value
        return cls(
            tuple(name for name, on in state.items() if on),
            tuple(name for name, on in state.items() if not on),
            no_plugins,
        )

    @property
    def files(self) -> tuple[str, ...]:
        """The enabled plugins that are files."""
        return tuple(name for name in self.enable if is_file(name))


@frozen
class Decision:
    """Whether one plugin is active, the setting that decides it, and how to switch the plugin on."""

    name: str
    active: bool
    why: str
    remedy: str = ""


@frozen
class PluginsTable:
    """The ``[plugins]`` table, read leniently: its types are checked when it is structured."""

    disable: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    strict: bool = False
    tables: tuple[str, ...] = ()
    """The plugins that have a table of their own in it."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> PluginsTable:
        return cls(
            _names(raw.get("disable")),
            _names(raw.get("require")),
            raw.get("strict") is True,
            tuple(key for key in raw if key not in RESERVED),
        )


def is_file(value: str) -> bool:
    """Whether a value of ``-p`` is the path of a file and not a name."""
    return value.endswith(".py") or "/" in value


def decide(
    records: Mapping[str, PluginRecord],
    table: PluginsTable,
    is_set: Callable[[str], bool],
    switches: Switches,
    given: Collection[str] = (),
    errors: list[GptSimpleError] | None = None,
) -> dict[str, Decision]:
    """A decision for every known plugin, sorted by name. ``given``: the names of passed classes and files.

    Unknown names and required plugins that are off are the problems of one ConfigError. It is raised, or appended to
    ``errors`` if that is a list.
    """
    known = sorted({*records, *given})
    decisions = {name: _decide(name, records.get(name), table, is_set, switches, name in given) for name in known}
    problems = [*_unknown_names(known, table, switches), *_missing_requirements(decisions, table)]
    if problems:
        error = ConfigError(*problems)
        if errors is None:
            raise error
        errors.append(error)
    return decisions


def _decide(
    name: str,
    record: PluginRecord | None,
    table: PluginsTable,
    is_set: Callable[[str], bool],
    switches: Switches,
    is_given: bool,
) -> Decision:
    builtin = record is not None and record.origin == "builtin"
    or_add = f"or add -p {name}"
    decision = Decision(name, False, "not asked for", f"add [plugins.{name}], {or_add}")
    if is_given:
        decision = Decision(name, True, "passed")
    elif builtin and (key := ENABLED_BY.get(name)):
        is_on = is_set(key)
        decision = Decision(name, is_on, key if is_on else f"{key} is unset", f"set {key}, {or_add}")
    elif name in table.tables:
        decision = Decision(name, True, f"[plugins.{name}]")
    elif builtin and name in DEFAULT_ON:
        decision = Decision(name, True, "default")
    if name in table.disable:
        decision = Decision(name, False, "plugins.disable", f"take it out of that list, {or_add}")
    if switches.no_plugins and not builtin and not is_given:
        decision = Decision(name, False, "--no-plugins", f"leave that out, {or_add}")
    if name in switches.enable:
        decision = Decision(name, True, "-p")
    if name in switches.disable:
        decision = Decision(name, False, f"-p no:{name}", f"leave out -p no:{name}")
    return decision


def why_absent(name: str, decisions: Mapping[str, Decision]) -> tuple[str, str]:
    """Why a plugin that something needs is not active, and what to do."""
    if (decision := decisions.get(name)) is not None:
        return f"is not active ({decision.why})", decision.remedy
    close = difflib.get_close_matches(name, decisions, 1)
    listed = f"`{PROGRAM} plugins list` shows what is installed"
    what = f"did you mean {close[0]!r}? " if close else "install its package and switch it on: "
    return "is not installed", what + (f"({listed})" if close else f"[plugins.{name}] or -p {name} ({listed})")


def unknown_plugin(name: str, known: Iterable[str]) -> Problem:
    """The problem of a name that none of the ``known`` plugins has."""
    close = difflib.get_close_matches(name, [*known], 1)
    message, all_of_them = f"no plugin {name!r} is installed", f"(`{PROGRAM} plugins list` shows them all)"
    hint = f"did you mean {close[0]!r}? {all_of_them}" if close else ""
    return Problem(None, "", message if close else f"{message} {all_of_them}", hint)


def _missing_requirements(decisions: Mapping[str, Decision], table: PluginsTable) -> Iterator[Problem]:
    for decision in (decisions[name] for name in table.require if name in decisions):
        if not decision.active:
            message = f"plugin {decision.name!r} is required but not active ({decision.why}): {decision.remedy}"
            yield Problem(None, "plugins.require", message)


def _unknown_names(known: Sequence[str], table: PluginsTable, switches: Switches) -> Iterator[Problem]:
    places: list[tuple[str, str | None, str]] = [(name, None, f"plugins.{name}") for name in table.tables]
    places += [(name, None, "plugins.disable") for name in table.disable]
    places += [(name, None, "plugins.require") for name in table.require]
    places += [(name, f"-p {name}", "") for name in switches.enable if not is_file(name)]
    places += [(name, f"-p no:{name}", "") for name in switches.disable]
    for name, location, key in places:
        if name not in known:
            yield unknown_plugin(name, known)._replace(location=location, key=key)


def _names(value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        return ()
    return tuple(dict.fromkeys(item for item in values if isinstance(item, str)))
