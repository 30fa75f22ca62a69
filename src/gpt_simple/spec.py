"""From a configuration file and the command line to everything that a run is made of, without importing torch.

Plugins come first, because they bring components and the shape of their own tables; then the configuration is
structured against all of that, and all of its mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from gpt_simple.config.load import RawConfig, read
from gpt_simple.config.origin import Origins
from gpt_simple.config.redact import secrets_in, without
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import structure
from gpt_simple.config.types import NULL_WORDS
from gpt_simple.errors import ConfigError, GptSimpleError, Problem, collecting, raise_all
from gpt_simple.hooks.components import CONFIG_KEY, Component, Kind, Registry, builtin_registry
from gpt_simple.hooks.results import Finding
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.discovery import installed
from gpt_simple.plugin_host.host import PluginHost

if TYPE_CHECKING:
    from gpt_simple.hooks.preflight import Preflight

# The section that a kind may bring a class for.
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
    """What followed the program's name on the command line that asked for it: ``run``, ``config.toml``, ..."""
    secrets: Sequence[str] = field(default=(), repr=False)
    """Values that no message may show."""

    @property
    def origins(self) -> Origins:
        """Where every value was set."""
        return self.raw.origins

    def with_defaults(self, values: Mapping[str, Any]) -> RunSpec:
        """The configuration with ``values`` (``section.field`` -> value) as defaults, checked again.

        The plugins and their tables stay. Raises ConfigError if the values do not go with those that were set.
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
        """The chosen parts: what the engine will build. A tokenizer that is a file is none, nor is an unset source."""
        names = {kind: attrgetter(key)(self.config) for kind, key in CONFIG_KEY.items()}
        return [part for (kind, name), part in self.registry.parts.items() if names[kind] == name]

    def check_config(self, preflight: Preflight) -> list[Finding]:
        """The findings of all plugins, with the places of keys as the user knows them."""
        return [self.shown(finding) for finding in self.host.check_config(self.config, preflight)]

    def shown(self, finding: Finding) -> Finding:
        """The finding with the location of its key, and without the values of secrets."""
        message, hint = without(finding.message, self.secrets), without(finding.hint, self.secrets)
        return evolve(finding, place=self.origins.place(finding.place), message=message, hint=hint)

    @contextmanager
    def located_errors(self) -> Iterator[None]:
        """Within, an error about a key of the configuration says where that was set, and shows no secret."""
        try:
            yield
        except GptSimpleError as error:
            error.replace_problems(_shown(error.problems, self.origins, self.secrets))
            raise


def resolve_spec(
    path: str | Path | None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    switches: Switches | None = None,
    sections: Mapping[str, object] | None = None,
    plugins: Sequence[Any] = (),
) -> RunSpec:
    """Read, import the active plugins, structure, check. All mistakes are one error, of the type of the worst.

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
    """As ``resolve_spec``, but what is wrong with plugins and the configuration is handed out, first the configuration.

    There is an spec whenever the configuration itself is sound; it has the plugins that are.
    """
    raw = read(path, overrides=overrides, sections=sections)
    errors: list[GptSimpleError] = []
    table = raw.values.get("plugins", {})
    host = PluginHost.activate(
        table if isinstance(table, Mapping) else {},  # the structuring will name it
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
    secrets = sorted(set(secrets_in(raw.values)))
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
    return spec, [error.replace_problems(_shown(error.problems, raw.origins, secrets)) for error in errors]


def _shown(problems: Iterable[Problem], origins: Origins, secrets: Sequence[str]) -> list[Problem]:
    """Problems with the location of their keys, and without the values of secrets."""
    return [
        problem._replace(message=without(problem.message, secrets), hint=without(problem.hint, secrets))
        for problem in map(origins.locate, problems)
    ]


def _section_classes(
    raw: RawConfig, registry: Registry, host: PluginHost
) -> tuple[dict[str, type], set[str], list[GptSimpleError]]:
    """The class of each section whose component brings its own, so that its fields are validated by it.

    Also the sections whose class is not known, and the errors that say why.
    """
    classes: dict[str, type] = {}
    unchecked: set[str] = set()
    unknown: list[GptSimpleError] = []
    for kind, key in CONFIG_KEY.items():
        name, section = raw.as_text(key) or raw.get(key), _SECTION_OF.get(kind)
        if not isinstance(name, str) or (kind == "tokenizer" and _is_file(name)):
            continue  # not a name, which the structuring or the data will look at
        if kind == "source" and name in NULL_WORDS:
            continue
        part: Component | None
        try:
            part = registry.get(kind, name)
        except ConfigError as error:
            part = registry.closest(kind, name)
            more = ", or the path of a tokenizer.json" if kind == "tokenizer" else ""
            more += _who_might_bring_it(host) if part is None else ""
            unknown.append(error.replace_problems(p._replace(hint=p.hint + more) for p in error.problems))
        if section and part is None:
            unchecked.add(section)
        elif section and part is not None and part.config is not None:
            classes[section] = part.config
    return classes, unchecked, unknown


def _is_file(tokenizer: str) -> bool:
    """Whether a tokenizer that has no name among the components is meant as a path, which the data look for."""
    path = Path(tokenizer)
    with suppress(OSError):  # too long for any file
        return path.exists() or bool(path.suffix) or len(path.parts) > 1
    return False


def _who_might_bring_it(host: PluginHost) -> str:
    """Plugins of other packages that are off, for somebody who installed one and thinks that this is enough."""
    external = [record.name for record in installed() if record.origin == "external"]
    off = [name for name in external if name in host.decisions and not host.decisions[name].active]
    return f"; if a plugin brings it, switch that on: [plugins.NAME] or -p NAME ({', '.join(off)})" if off else ""
