"""The installed plugins, from package metadata alone: finding a plugin never imports it.

So an installed package that is broken breaks nothing. The order is that of names, never that of the file system, so it
is the same on every process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import (
    EntryPoint,
    PackageMetadata,
    PackageNotFoundError,
    distribution,
    distributions,
    entry_points,
)
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from attrs import evolve, field, frozen

from gpt_simple._names import COMMAND_GROUP, DISTRIBUTION, PLUGIN_GROUP, __version__

DEFAULT_ON = frozenset({"checkpoint", "console", "evaluate", "metrics", "sample", "throughput", "validate"})
"""Built-in plugins that are on by default. A plugin of another package never is."""

ENABLED_BY = MappingProxyType({"wandb": "training.wandb_project"})
"""Built-in plugins that are on exactly when this field of the configuration is set."""

RESERVED = frozenset({"disable", "require", "strict"})
"""Keys of ``[plugins]`` that are switches and therefore cannot be names of plugins."""

NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")

Origin = Literal["builtin", "external"]
Problem = Literal["", "shadowed", "duplicate", "incompatible", "bad name"]


@frozen
class PluginRecord:
    """An entry point: its name, its value ``module:attribute``, and its distribution.

    ``problem`` says in a word why it cannot be used, ``detail`` in a sentence; both are empty if it can.
    """

    name: str
    value: str
    distribution: str
    version: str
    origin: Origin
    problem: Problem = ""
    detail: str = ""
    entry_point: EntryPoint | None = field(default=None, repr=False, eq=False)

    @property
    def label(self) -> str:
        """``csvlog (gpt-simple-csvlog 0.1.0)``."""
        return f"{self.name} ({self.distribution} {self.version})"


def installed(group: str = PLUGIN_GROUP) -> list[PluginRecord]:
    """All entry points of a group: sorted by name, then built-in ones first, then by distribution."""
    packages: dict[int, tuple[str, str]] = {}
    found = (_record(entry, packages) for entry in _entry_points(group))
    records = sorted((record for record in found if record is not None), key=_rank)
    by_name: dict[str, list[PluginRecord]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    return [_judge(record, by_name[record.name]) if record.origin == "external" else record for record in records]


def commands() -> list[PluginRecord]:
    """All entry points of commands, by the same rules."""
    return installed(COMMAND_GROUP)


def own_commands() -> dict[str, PluginRecord]:
    """The commands of this distribution, by name. No package can replace them, so no other metadata is read."""
    try:
        entries = distribution(DISTRIBUTION).entry_points.select(group=COMMAND_GROUP)
    except PackageNotFoundError:
        return {}
    return {
        entry.name: PluginRecord(entry.name, entry.value, DISTRIBUTION, __version__, "builtin", entry_point=entry)
        for entry in entries
    }


def usable(records: Iterable[PluginRecord]) -> dict[str, PluginRecord]:
    """The record that each name refers to, which is never a shadowed one."""
    chosen: dict[str, PluginRecord] = {}
    for record in records:
        if record.problem != "shadowed":
            chosen.setdefault(record.name, record)
    return chosen


def summary(record: PluginRecord) -> str:
    """One line: the module docstring of a built-in (read, not imported), else the distribution's summary."""
    if record.origin == "external":
        dist = record.entry_point.dist if record.entry_point else None
        return _field(dist.metadata, "Summary") if dist else ""
    spec = find_spec(record.value.partition(":")[0])
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    # Parsing the modules would take longer than the rest of `plugins list`.
    with Path(spec.origin).open(encoding="utf-8") as source:
        first = source.readline().strip()
    return first.strip('"').replace("``", "") if first.startswith('"""') else ""


def _field(metadata: PackageMetadata, name: str) -> str:
    """A field of a package; empty if it has none, which later versions of Python answer with a KeyError."""
    return str(metadata[name]) if name in metadata else ""


def name_problem(name: str) -> str:
    """Why this cannot be a plugin's name; empty if it can."""
    if not NAME_PATTERN.fullmatch(name):
        return f"the name {name!r} does not match [a-z][a-z0-9_]*"
    return f"the name {name!r} is reserved for a key of [plugins]" if name in RESERVED else ""


def _entry_points(group: str) -> Iterable[EntryPoint]:
    """All of a group. If a damaged file makes the whole search fail, search each package and skip the damaged ones."""
    try:
        return entry_points(group=group)
    except Exception:
        found: dict[str, list[EntryPoint]] = {}
        for dist in distributions():
            with suppress(Exception):
                # Of two copies, the first on the path is the one that is imported.
                found.setdefault(
                    _normalised(_field(dist.metadata, "Name")), list(dist.entry_points.select(group=group))
                )
        return [entry for entries in found.values() for entry in entries]


def _record(entry: EntryPoint, packages: dict[int, tuple[str, str]]) -> PluginRecord | None:
    """None if the package's metadata has no name, as after an incomplete uninstallation."""
    dist = entry.dist
    assert dist is not None, "entry points of installed distributions have it"
    if (package := packages.get(id(dist))) is None:
        # Each access parses the whole metadata with its README, so it is done once for each distribution.
        try:
            metadata = dist.metadata
            name, version = _field(metadata, "Name"), _field(metadata, "Version")
        except Exception:
            return None
        if not name:
            return None
        package = packages[id(dist)] = name, version or "?"
    origin: Origin = "builtin" if _normalised(package[0]) == DISTRIBUTION else "external"
    return PluginRecord(entry.name, entry.value, *package, origin, entry_point=entry)


def _rank(record: PluginRecord) -> tuple[str, bool, str, str]:
    return record.name, record.origin == "external", _normalised(record.distribution), record.value


def _judge(record: PluginRecord, namesakes: list[PluginRecord]) -> PluginRecord:
    """The record of another package, with its problem if it has one."""
    others = [other for other in namesakes if other is not record]
    if any(other.origin == "builtin" for other in others):
        detail = f"{record.label} takes the name of a built-in plugin and is ignored: its author must rename it"
        return evolve(record, problem="shadowed", detail=detail)
    if others:
        packages = " and ".join(f"{other.distribution} {other.version}" for other in namesakes)
        detail = f"{record.name!r} is claimed by {packages}: uninstall all but one of them"
        return evolve(record, problem="duplicate", detail=detail)
    if problem := name_problem(record.name):
        return evolve(record, problem="bad name", detail=f"{record.label}: {problem}")
    if unmet := _unmet_requirement(record):
        detail = f"{record.label} needs {unmet}, and {__version__} is installed: install a version that fits"
        return evolve(record, problem="incompatible", detail=detail)
    return record


def _unmet_requirement(record: PluginRecord) -> str:
    """The package's requirement on this distribution, if the installed version does not satisfy it."""
    dist = record.entry_point.dist if record.entry_point else None
    for text in (dist.requires if dist else None) or ():
        if not _normalised(text).startswith(DISTRIBUTION):
            continue
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ours = applies and _normalised(requirement.name) == DISTRIBUTION
        if ours and not requirement.specifier.contains(__version__, prereleases=True):
            return f"{requirement.name}{requirement.specifier}"
    return ""


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
