"""From a configuration file and the command line to everything that a run is made of, without importing torch.

Plugins come first, because they bring components and the shape of their own tables; then the configuration is
structured against all of that, and all of its mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from operator import attrgetter
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from gpt_simple.config.convert import null_words
from gpt_simple.config.load import RawConfig, read
from gpt_simple.config.origin import Origins
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import structure, with_other_mistakes
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.activation import Switches
from gpt_simple.hooks.answers import Finding
from gpt_simple.hooks.components import CONFIG_KEY, Component, Kind, Registry, builtin_registry
from gpt_simple.hooks.discovery import installed
from gpt_simple.hooks.host import PluginHost

# Kinds whose name stands in the configuration itself; a tokenizer may also be a file, which the data look for.
_SECTION_OF: dict[Kind, str] = {"model": "model", "optimizer": "optimizer", "schedule": "optimizer", "source": "data"}


@frozen
class Questions:
    """What is asked of the checks.

    ``launching``: a run is about to start and reads its data and checkpoints itself in a moment. ``force``: it would
    discard what is in its output directory. ``world_size``: processes. ``memory`` asks for a prediction, for the memory
    of ``device`` (a name or bytes), ``fit`` for the largest batch in it; ``probe`` for real steps; ``mfu`` is what an
    estimate without steps assumes.
    """

    launching: bool = False
    force: bool = False
    world_size: int = 1
    memory: bool = False
    device: str | None = None
    fit: bool = False
    probe: bool = False
    mfu: float = 0.4


@frozen
class Assembly:
    """A checked configuration, the plugins that it activates, and the components it can choose from."""

    config: Config
    origins: Origins
    host: PluginHost
    registry: Registry
    source: Path | None
    notes: Sequence[str] = ()
    arguments: Sequence[str] = ()
    """What followed the program's name on the command line that asked for it: ``run``, ``config.toml``, ..."""

    @property
    def components(self) -> list[Component]:
        """The chosen parts: what the engine will build. A tokenizer that is a file is none, nor is an unset source."""
        names = {kind: attrgetter(key)(self.config) for kind, key in CONFIG_KEY.items()}
        return [part for (kind, name), part in self.registry.parts.items() if names[kind] == name]

    def check_config(self, questions: Questions) -> list[Finding]:
        """The findings of all plugins, with the places of keys as the user knows them."""
        token = _UNDER_CHECK.set((self, questions))
        try:
            findings = self.host.check_config(self.config)
        finally:
            _UNDER_CHECK.reset(token)
        return [evolve(finding, place=self.origins.place(finding.place)) for finding in findings]


_UNDER_CHECK: ContextVar[tuple[Assembly, Questions] | None] = ContextVar("under_check", default=None)


def under_check() -> tuple[Assembly, Questions] | None:
    """What is being checked by plugins right now: behind ``gpt_simple.outlook``, since a check gets a Config alone."""
    return _UNDER_CHECK.get()


def assemble(
    path: str | Path | None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    switches: Switches | None = None,
    sections: Mapping[str, object] | None = None,
    plugins: Sequence[Any] = (),
) -> Assembly:
    """Read, import the active plugins, structure, check.

    ``overrides`` are (dotted key, text) pairs from a command line; ``sections`` are values given in Python, which
    replace the file's sections; ``plugins`` are plugin classes or instances given in Python.
    """
    raw = read(path, overrides=overrides, sections=sections)
    try:
        host = PluginHost.activate(
            _plugins_table(raw),
            set_keys=raw.is_set,
            switches=switches or Switches(),
            extra=plugins,
            place=raw.origins.place,
        )
    except ConfigError as error:
        raise with_other_mistakes(error, raw) from None
    registry = builtin_registry()
    host.register_components(registry)
    classes = _section_classes(raw, registry, host)
    config = structure(raw, sections=classes, plugin_configs=host.config_classes())
    registry.pair(config.optimizer.name, config.optimizer.schedule)
    host.instantiate(config)
    return Assembly(config, raw.origins, host, registry, Path(path) if path is not None else None, raw.notes)


def _plugins_table(raw: RawConfig) -> Mapping[str, Any]:
    table = raw.values.get("plugins", {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{raw.origins.place('plugins')}: expected a table, got {table!r}")
    return table


def _section_classes(raw: RawConfig, registry: Registry, host: PluginHost) -> dict[str, type]:
    """The class of each section whose component brings its own, so that its fields are validated by it."""
    classes: dict[str, type] = {}
    unknown: dict[str, Kind] = {}
    for kind, section in _SECTION_OF.items():
        name = raw.get(CONFIG_KEY[kind])
        if not isinstance(name, str) or (kind == "source" and name in null_words(str | None)):
            continue  # left at its default, or a mistake that the structuring will name
        try:
            part = registry.get(kind, name, raw.origins.place(CONFIG_KEY[kind]))
        except ConfigError as error:
            unknown[f"{error}{_who_might_bring_it(host) if 'did you mean' not in str(error) else ''}"] = kind
        else:
            if part.config is not None:
                classes[section] = part.config
    if unknown:
        unchecked = [_SECTION_OF[kind] for kind in unknown.values() if kind != "schedule"]
        raise with_other_mistakes(ConfigError("\n".join(unknown)), raw, unchecked=unchecked)
    return classes


def _who_might_bring_it(host: PluginHost) -> str:
    """Plugins of other packages that are off, for somebody who installed one and thinks that this is enough."""
    external = [record.name for record in installed() if record.origin == "external"]
    off = [name for name in external if name in host.decisions and not host.decisions[name].active]
    return f"; if a plugin brings it, switch that on: [plugins.NAME] or -p NAME ({', '.join(off)})" if off else ""
