"""The plugin host: from the ``[plugins]`` table to a table of calls.

``activate`` decides, imports and lints; ``instantiate`` makes the plugins once their configuration is structured;
``calls`` compiles the hooks for one process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field
from pluggy import HookimplOpts, PluginManager, PluginValidationError

from gpt_simple._names import DISTRIBUTION
from gpt_simple.errors import ConfigError, GptSimpleError, PluginError, Problem, collecting, did_you_mean, raise_all
from gpt_simple.hooks.components import Registry
from gpt_simple.hooks.plugin import EVAL, LIVE
from gpt_simple.hooks.results import Finding
from gpt_simple.hooks.run import MISSING
from gpt_simple.hooks.specs import HOOKS, PROJECT, HookSpecs
from gpt_simple.plugin_host.activation import Decision, PluginsTable, Switches, decide, why_absent
from gpt_simple.plugin_host.discovery import installed, usable
from gpt_simple.plugin_host.dispatch import (
    DISPATCHED,
    Around,
    Calls,
    Guard,
    Impl,
    Implementation,
    OnFailure,
    checked,
)
from gpt_simple.plugin_host.lint import lint_instance
from gpt_simple.plugin_host.loading import (
    LoadedPlugin,
    PassedPlugin,
    load_file,
    load_plugin,
    name_passed,
    ordered,
    refused,
    taking_all,
)
from gpt_simple.plugin_host.state import PluginStates, Record

if TYPE_CHECKING:
    import torch

    WeightSet = Mapping[str, torch.Tensor]

    from gpt_simple.config.schema import Config
    from gpt_simple.hooks.preflight import Preflight


_SET_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class _Manager(PluginManager):
    """pluggy inspects every attribute of a plugin; only one with the name of a hook can be a hook."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> HookimplOpts | None:
        return super().parse_hookimpl_opts(plugin, name) if name in HOOKS else None


@define(eq=False)
class PluginHost:
    """The active plugins of a run, in call order."""

    plugins: tuple[LoadedPlugin, ...]
    decisions: Mapping[str, Decision]
    failures: Mapping[str, GptSimpleError]
    """The error of each active plugin that could not be loaded."""
    inactive_configs: Mapping[str, type]
    """Config classes of plugins that are off but have a table, which is validated all the same."""
    notes: tuple[str, ...] = ()
    """Warnings, such as a disabled plugin that could not be imported."""
    broken: tuple[str, ...] = ()
    """A sentence for each installed plugin that cannot be used."""
    strict: bool = False
    guard: Guard = field(factory=Guard)
    """Checks the state of the process after every hook and plain method; a change is the plugin's failure."""
    wrap: Callable[[Implementation], Implementation] | None = None
    """Put around every implementation of a hook of a run, for tests."""
    _manager: PluginManager = field(init=False)
    _calls: Calls | None = None
    _is_main: bool = True
    _states: PluginStates = field(factory=PluginStates)
    _sets: dict[str, list[str]] = field(factory=dict)
    """Plugin -> the names of its sets of weights when it was asked first, which stay."""

    def __attrs_post_init__(self) -> None:
        self._manager = _Manager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)

    @classmethod
    def activate(
        cls,
        raw_plugins: Mapping[str, Any],
        *,
        set_keys: Callable[[str], bool],
        switches: Switches | None = None,
        extra: Sequence[PassedPlugin] = (),
        errors: list[GptSimpleError] | None = None,
    ) -> PluginHost:
        """Decide which plugins are on, import exactly those and check them.

        ``raw_plugins`` is the ``[plugins]`` table as it was read; ``set_keys`` returns whether a dotted key of the
        configuration has a value; ``extra`` are classes or instances from Python, named like their class in lower
        case. Unknown names are a ConfigError, each mistake of an active plugin is a problem of a PluginError. They are
        raised, or appended to ``errors`` if that is a list; the host then has the other plugins.
        """
        found: list[GptSimpleError] = []
        switches = switches or Switches()
        everything = installed()
        records = usable(everything)
        table = PluginsTable.read(raw_plugins)
        given = name_passed(extra, records, table.tables)
        for path in switches.files:
            with collecting(found):
                given.update([load_file(path)])
        broken_files = {Path(path).stem for path in switches.files} - given.keys()
        decisions = decide(records, table, set_keys, switches, {*given, *broken_files}, found)
        loaded: list[LoadedPlugin] = []
        failures: dict[str, GptSimpleError] = {}
        inactive_configs: dict[str, type] = {}
        notes: list[str] = []
        for name, decision in decisions.items():
            is_ignored = switches.no_plugins and (name not in records or records[name].origin != "builtin")
            has_table = name in table.tables and not is_ignored
            if name in broken_files or not (decision.active or has_table):
                continue
            try:
                plugin = load_plugin(name, given.get(name), records.get(name))
            except GptSimpleError as error:
                if decision.active:
                    failures[name] = error
                else:
                    notes.append(f"[plugins.{name}] is off and was not checked: {error}")
            else:
                if decision.active:
                    loaded.append(plugin)
                else:
                    inactive_configs[name] = plugin.cls.Config
        failures |= _without_requirements(loaded, decisions, {*failures, *broken_files}, table.tables)
        loaded = [plugin for plugin in loaded if plugin.name not in failures]
        found += failures.values()
        with collecting(found):
            loaded = ordered(loaded)
        if errors is None:
            raise_all(found)
        else:
            errors += found
        broken = tuple(record.detail for record in everything if record.problem)
        return cls(tuple(loaded), decisions, failures, inactive_configs, tuple(notes), broken, table.strict)

    @property
    def names(self) -> tuple[str, ...]:
        """The plugins' names in call order, but the built-in ones first."""
        builtin_first = sorted(self.plugins, key=lambda plugin: plugin.distribution != DISTRIBUTION)
        return tuple(plugin.name for plugin in builtin_first)

    def config_classes(self) -> dict[str, type]:
        """Plugin -> its config class, for every table that is to be structured."""
        active = {plugin.name: plugin.cls.Config for plugin in self.plugins if plugin.instance is None}
        return {**self.inactive_configs, **active}

    def register_components(self, registry: Registry) -> None:
        """Let every plugin add its parts, with itself as their owner. Raises the errors of all plugins."""
        errors: list[GptSimpleError] = []
        for plugin in self.plugins:
            with collecting(errors):
                plugin.register_components(registry)
        raise_all(errors)

    def instantiate(self, config: Config) -> None:
        """Make every plugin with its own configuration; pluggy checks it against the specs.

        Raises the errors of all plugins.
        """
        errors: list[GptSimpleError] = []
        for plugin in self.plugins:
            with collecting(errors):
                self._make(plugin, config)
        raise_all(errors)

    def _make(self, plugin: LoadedPlugin, config: Config) -> None:
        try:
            if plugin.instance is None:
                plugin.instance = plugin.cls(config.plugins.tables.get(plugin.name, plugin.cls.Config()))
            mistakes = lint_instance(plugin.instance)
        except BaseException as error:
            raise plugin.failure("__init__", error) from error
        if mistakes:
            raise refused(plugin.label, mistakes)
        try:
            self._manager.register(plugin.instance, plugin.name)
        except PluginValidationError as error:
            raise PluginError(f"plugin {plugin.label}: {error}") from error
        except BaseException as error:
            raise plugin.failure("__init__", error) from error

    def check_config(self, config: Config, preflight: Preflight) -> list[Finding]:
        """The findings of all plugins; one without a place gets its plugin's table. A failure is a finding."""
        findings: list[Finding] = []
        for implementation, plugin in self._impls("check_config"):
            try:
                result = self.guard.call(partial(implementation, config, preflight))
                found = checked(HOOKS["check_config"], result)
            except BaseException as error:
                failure = plugin.failure("check_config", error)
                findings += Finding.of_error(failure, "plugin-failed")
                continue
            findings += [f if f.place else evolve(f, place=f"plugins.{plugin.name}") for f in found]
        return findings

    def calls(
        self,
        is_main: bool,
        on_failure: OnFailure,
        *,
        world_size: int = 1,
        guard: Guard | None = None,
        around: Mapping[str, Around] | None = None,
    ) -> Calls:
        """Compile the hooks for this process. ``on_failure`` is called for each plugin that is switched off.

        ``around`` has a function for some hooks, which is put around each implementation of that hook.
        """
        self.guard, around = guard or self.guard, around or {}
        calls = Calls(on_failure, alone=world_size == 1, strict=self.strict, guard=self.guard)
        for hook in DISPATCHED:
            impls = self._impls(hook)
            if (outer := around.get(hook)) is not None:
                impls = [(outer(plugin.name, implementation), plugin) for implementation, plugin in impls]
            calls.listen(hook, [impl for impl in impls if is_main or _runs_everywhere(hook, impl[1])])
        self._calls, self._is_main = calls, is_main
        return calls

    def close(self) -> None:
        """Let go of the plugins, except for ``plugins``, so that nothing keeps the tensors of a run that is over."""
        if self._calls is not None:
            self._calls.close()
        for plugin in self.plugins:
            if self._manager.has_plugin(plugin.name):
                self._manager.unregister(name=plugin.name)

    def active(self, name: str, default: Any = MISSING) -> Any:
        """The instance of a plugin that is called on this process, else ``default``; without one raise PluginError."""
        found = next((plugin for plugin in self.plugins if plugin.name == name), None)
        if found is None:
            why, remedy = why_absent(name, self.decisions)
        elif self._calls is not None and name in self._calls.switched_off:
            why, remedy = "was switched off, because it failed", "the warning before says why"
        elif not (self._is_main or found.ranks == "all"):
            why, remedy = (
                "runs on the main process only",
                'ask where run.is_main is true, or let it declare ranks = "all"',
            )
        else:
            return found.instance
        if default is not MISSING:
            return default
        raise PluginError(f"run.plugin: plugin {name!r} {why}", hint=remedy)

    def order_hash(self) -> str:
        """A short hash of which plugins run, of which version, in which order; the same on all processes."""
        import hashlib  # only here, because it loads OpenSSL and only a run needs it

        lines = [f"{p.name} {p.distribution} {p.version} {p.cls.__qualname__}" for p in self.plugins]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, dict[str, Any]]:
        """The plugins' facts for the summary, by name, without plugins that have none or were switched off.

        Only plugins that run on this process are called: on another one they have seen nothing of the run.
        """
        here = [plugin for plugin in self.plugins if self._is_main or plugin.ranks == "all"]
        facts = {plugin.name: self._guarded(plugin, "describe", partial(_described, plugin)) for plugin in here}
        return {name: value for name, value in facts.items() if value}

    def state(self) -> tuple[dict[str, Record], dict[str, torch.Tensor]]:
        """The state of all plugins for a checkpoint: JSON by plugin, and tensors by ``plugin/path``.

        Records that were loaded for a missing plugin are carried forward.
        """
        return self._states.save(self.plugins, self._guarded, self._sets)

    def load_state(
        self,
        records: Mapping[str, Record],
        tensors: Mapping[str, torch.Tensor],
        *,
        is_main: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Hand stored state back to its owners. Raises CheckpointError if a required plugin is missing.

        ``device`` is where tensors go that were not in host memory.
        """
        self._states.load(self.plugins, records, tensors, is_main, self.guard, device)

    def weight_sets(self, check: Callable[[WeightSet], object]) -> dict[str, WeightSet]:
        """The plugins' sets of weights by name, each checked by ``check``.

        What does not fit is a failure of its plugin. Raises PluginError if two plugins have sets of one name.
        """
        found: dict[str, WeightSet] = {}
        owners: dict[str, LoadedPlugin] = {}
        for plugin in self.plugins:
            sets = self._guarded(plugin, "weight_sets", partial(self._sets_of, plugin, check)) or {}
            for name in sets.keys() & owners.keys():
                others = f"plugins {owners[name].label} and {plugin.label}"
                raise PluginError(f"{others} both have weights of the name {name!r}", hint="give one another name")
            found |= sets
            owners |= dict.fromkeys(sets, plugin)
        return found

    def check_used_weights(self, sets: Collection[str]) -> None:
        """Raise ConfigError for all names in the plugins' options that are neither in ``sets`` nor ``live``."""
        known = (LIVE, *sets)
        hint = f"expected one of {', '.join(known)}; others come with the plugin that keeps them"
        problems = []
        for plugin in self.plugins:
            used = self._guarded(plugin, "used_weights", partial(_used_weights, plugin)) or {}
            for option, names in used.items():
                for name in (name for name in names if name not in known):
                    message = f"there are no weights of the name {name!r}{did_you_mean(name, known)}"
                    problems.append(Problem(None, f"plugins.{plugin.name}.{option}", message, hint))
        if problems:
            raise ConfigError(*problems)

    def _sets_of(self, plugin: LoadedPlugin, check: Callable[[WeightSet], object]) -> Mapping[str, WeightSet]:
        sets: Mapping[str, WeightSet] = plugin.instance.weight_sets()
        if not isinstance(sets, Mapping):
            raise PluginError(f"it returned a {type(sets).__name__}; expected a mapping of names to sets of weights")
        for name, weights in sets.items():
            if not isinstance(name, str) or not _SET_NAME.fullmatch(name) or name in (LIVE, EVAL):
                raise PluginError(
                    f"it has weights of the name {name!r}",
                    hint=f"expected lower-case letters, digits, _ and -, a letter in front, and not {LIVE} or {EVAL}",
                )
            try:
                check(weights)
            except PluginError as error:
                raise PluginError(f"its weights {name!r}: {error}") from error
        if sorted(sets) != (made := self._sets.setdefault(plugin.name, sorted(sets))):
            raise PluginError(
                f"it has the weights {', '.join(sets) or 'none'} now, and had {', '.join(made) or 'none'} when the run"
                " was built",
                hint="make them in on_model_built, where a resume finds them",
            )
        return sets

    def _impls(self, hook: str) -> list[Impl]:
        """The implementations of a hook in call order, each as a function of all its arguments."""
        found = {impl.plugin_name: impl for impl in getattr(self._manager.hook, hook).get_hookimpls()}
        wrap, arguments = self.wrap or (lambda implementation: implementation), HOOKS[hook].arguments
        here = [(found[plugin.name], plugin) for plugin in self.plugins if plugin.name in found]
        return [(taking_all(wrap(impl.function), impl.argnames, arguments), plugin) for impl, plugin in here]

    def _guarded(self, plugin: LoadedPlugin, method: str, call: Callable[[], Any]) -> Any:
        """Call a plain method under the failure policy; None from a plugin that was switched off."""
        if plugin.failed:
            return None
        try:
            return self.guard.call(call)
        except BaseException as error:
            if self._calls is None:
                raise plugin.failure(method, error) from error
            self._calls.fail(plugin, method, None, error)
            return None


def _used_weights(plugin: LoadedPlugin) -> Mapping[str, Sequence[str]]:
    """What ``used_weights`` returns, with a list of names for each option."""
    used = plugin.instance.used_weights()
    if not isinstance(used, Mapping):
        raise PluginError(f"it returned a {type(used).__name__}; expected a mapping of options to names of weights")
    return {option: (names,) if isinstance(names, str) else tuple(names) for option, names in used.items()}


def _described(plugin: LoadedPlugin) -> Mapping[str, Any]:
    """What ``describe`` returns, which must be a mapping that JSON can hold."""
    facts = plugin.instance.describe()
    if not isinstance(facts, Mapping):
        raise PluginError(f"it returned a {type(facts).__name__}; expected a mapping")
    json.dumps(facts)
    return facts


def _runs_everywhere(hook: str, plugin: LoadedPlugin) -> bool:
    ranks = HOOKS[hook].ranks
    return ranks == "all" or (ranks == "plugin" and plugin.ranks == "all")


def _without_requirements(
    loaded: Sequence[LoadedPlugin],
    decisions: Mapping[str, Decision],
    failed: Collection[str],
    tables: Collection[str],
) -> dict[str, GptSimpleError]:
    """The error of each plugin that requires one that is not active. Those that ``failed`` have errors of their own."""
    here = {*failed, *(plugin.name for plugin in loaded)}
    errors: dict[str, GptSimpleError] = {}
    for plugin in loaded:
        problems = []
        for name in plugin.cls.requires:
            if name not in here:
                why, remedy = why_absent(name, decisions)
                message = f"plugin {plugin.label} requires plugin {name!r}, which {why}"
                key = f"plugins.{plugin.name}" if plugin.name in tables else ""
                problems.append(Problem(None, key, message, f"{remedy}; or switch {plugin.name!r} off"))
        if problems:
            errors[plugin.name] = PluginError(*problems)
    return errors
