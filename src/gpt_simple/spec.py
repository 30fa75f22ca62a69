"""Resolve a configuration file and a command line to everything that a run is made of, without importing torch.

Plugins are activated first, because they bring components and the classes of their own tables. Then the configuration
is structured against these classes, and all mistakes are reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from gpt_simple.config.load import RawConfig
from gpt_simple.config.origin import Origins
from gpt_simple.config.redact import (
    all_without,
    hide_in_error,
    secrets_in,
    secrets_of_environment,
    spellings,
    without,
)
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import structure
from gpt_simple.config.types import NULL_WORDS
from gpt_simple.errors import ConfigError, GptSimpleError, collecting, raise_all
from gpt_simple.hooks.components import CONFIG_KEY, Component, Kind, Registry, builtin_registry
from gpt_simple.hooks.results import Finding
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.discovery import installed
from gpt_simple.plugin_host.host import PluginHost
from gpt_simple.run_config import read_config

if TYPE_CHECKING:
    from gpt_simple.hooks.preflight import Preflight

# The section that a kind of component may bring a class for.
_SECTION_OF: dict[Kind, str] = {"model": "model", "optimizer": "optimizer", "source": "data"}


@frozen
class RunSpec:
    """A checked configuration, the plugins that it activates, and the components it can choose from."""

    config: Config
    raw: RawConfig = field(repr=False)
    host: PluginHost
    registry: Registry
    source: Path | None
    notes: Sequence[str] = ()
    arguments: Sequence[str] = ()
    """The command line after the program's name: ``run``, ``config.toml``, ...; empty if there is none."""
    secrets: Sequence[str] = field(default=(), repr=False)
    """Values that no message may show."""

    @property
    def origins(self) -> Origins:
        """Where every value was set."""
        return self.raw.origins

    def with_defaults(self, values: Mapping[str, Any]) -> RunSpec:
        """The configuration with ``values`` (``section.field`` -> value) as defaults, checked again.

        The plugins and their tables stay. Raises ConfigError if the values contradict those that were set.
        """
        merged = dict(self.raw.values)
        for key, value in values.items():
            section, _, name = key.partition(".")
            merged[section] = {**(merged.get(section) or {}), name: value}
        raw = evolve(self.raw, values=merged)
        classes, _, unknown = _section_classes(raw, self.registry, self.host)
        raise_all(unknown)
        config = structure(raw, sections=classes, plugin_configs=self.host.config_classes())
        self.registry.pair(config.optimizer.name, config.optimizer.schedule)
        return evolve(self, config=evolve(config, plugins=self.config.plugins), raw=raw)

    @property
    def components(self) -> list[Component]:
        """The components that the engine builds: not a tokenizer that is a file, nor a source that is not set."""
        names = {kind: attrgetter(key)(self.config) for kind, key in CONFIG_KEY.items()}
        return [part for (kind, name), part in self.registry.parts.items() if names[kind] == name]

    def check_config(self, preflight: Preflight) -> list[Finding]:
        """The findings of all plugins, with locations."""
        return [self.with_location(finding) for finding in self.host.check_config(self.config, preflight)]

    def with_location(self, finding: Finding) -> Finding:
        """The finding with the location of its key, and without the values of secrets."""
        message, hint = without(finding.message, self.secrets), without(finding.hint, self.secrets)
        return evolve(finding, place=self.origins.place(finding.place), message=message, hint=hint)

    @contextmanager
    def located_errors(self) -> Iterator[None]:
        """Add the location of their keys to the errors raised within, and hide the secrets in all that are raised."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, GptSimpleError):
                error.replace_problems(map(self.origins.locate, error.problems))
            hide_in_error(error, self.secrets)
            raise

    def without_secrets(self, value: Any) -> Any:
        """A value for logs and files with the secrets hidden in each of its texts."""
        return all_without(value, self.secrets)


def resolve_spec(
    path: str | Path | None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    switches: Switches | None = None,
    sections: Mapping[str, object] | None = None,
    plugins: Sequence[Any] = (),
) -> RunSpec:
    """Read the configuration, import the active plugins, structure and check. All mistakes are one error.

    The error has the type of the worst mistake.

    ``overrides`` are (dotted key, text) pairs from a command line; ``sections`` are values given in Python, which
    replace the file's sections; ``plugins`` are plugin classes or instances given in Python.
    """
    spec, errors = try_resolve(path, overrides=overrides, switches=switches, sections=sections, plugins=plugins)
    raise_all(errors)
    assert spec is not None, "without errors there is one"
    return spec


def try_resolve(
    path: str | Path | None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    switches: Switches | None = None,
    sections: Mapping[str, object] | None = None,
    plugins: Sequence[Any] = (),
) -> tuple[RunSpec | None, Sequence[GptSimpleError]]:
    """Like ``resolve_spec``, but return the errors: first those of the configuration, then those of plugins.

    There is a spec whenever the configuration itself is valid; it has the plugins that are.
    """
    raw = read_config(path, overrides=overrides, sections=sections)
    errors: list[GptSimpleError] = []
    table = raw.values.get("plugins", {})
    host = PluginHost.activate(
        table if isinstance(table, Mapping) else {},  # structure() reports anything else
        set_keys=raw.is_set,
        switches=switches or Switches(),
        extra=plugins,
        errors=errors,
    )
    registry = builtin_registry()
    with collecting(errors):
        host.register_components(registry)
    classes, unchecked, unknown = _section_classes(raw, registry, host)
    checked = evolve(raw, values={name: values for name, values in raw.values.items() if name not in unchecked})
    secrets = spellings((*secrets_in(raw.values), *secrets_in(raw.texts), *secrets_of_environment(os.environ)))
    wrong: list[GptSimpleError] = []
    with collecting(wrong):
        config = structure(checked, sections=classes, plugin_configs=host.config_classes())
    wrong += unknown
    errors, spec = [*wrong, *errors], None
    if not wrong:
        with collecting(errors):
            registry.pair(config.optimizer.name, config.optimizer.schedule)
        with collecting(errors):
            host.instantiate(config)
        source = Path(path) if path is not None else None
        spec = RunSpec(config, raw, host, registry, source, raw.notes, secrets=secrets)
    for error in errors:
        hide_in_error(error.replace_problems(map(raw.origins.locate, error.problems)), secrets)
    return spec, errors


def _section_classes(
    raw: RawConfig, registry: Registry, host: PluginHost
) -> tuple[dict[str, type], set[str], list[GptSimpleError]]:
    """The class of each section whose component brings its own, by which its fields are validated.

    Also the sections whose class is unknown, and an error for each unknown component.
    """
    classes: dict[str, type] = {}
    unchecked: set[str] = set()
    unknown: list[GptSimpleError] = []
    for kind, key in CONFIG_KEY.items():
        name, section = raw.as_text(key) or raw.get(key), _SECTION_OF.get(kind)
        if not isinstance(name, str) or (kind == "tokenizer" and _is_file(name)):
            continue  # structure() reports a value that is no text, and preflight a file that is missing
        if kind == "source" and name in NULL_WORDS:
            continue
        part: Component | None
        try:
            part = registry.get(kind, name)
        except ConfigError as error:
            part = registry.closest(kind, name)
            more = ", or the path of a tokenizer.json" if kind == "tokenizer" else ""
            more += _inactive_plugins(host) if part is None else ""
            unknown.append(error.replace_problems(p._replace(hint=p.hint + more) for p in error.problems))
        if section and part is None:
            unchecked.add(section)
        elif section and part is not None and part.config is not None:
            classes[section] = part.config
    return classes, unchecked, unknown


def _is_file(tokenizer: str) -> bool:
    """Whether a tokenizer without such a name among the components is a path."""
    path = Path(tokenizer)
    with suppress(OSError):  # too long for any file
        return path.exists() or bool(path.suffix) or len(path.parts) > 1
    return False


def _inactive_plugins(host: PluginHost) -> str:
    """A hint that names the installed plugins of other packages that are off: installing one does not activate it."""
    external = [record.name for record in installed() if record.origin == "external"]
    off = [name for name in external if name in host.decisions and not host.decisions[name].active]
    return f"; if a plugin brings it, switch that on: [plugins.NAME] or -p NAME ({', '.join(off)})" if off else ""
