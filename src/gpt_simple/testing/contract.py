"""The suite that every plugin should pass."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import frozen

from gpt_simple import Plugin, Run, hookimpl
from gpt_simple.checkpoint.store import Store, weights_stem
from gpt_simple.errors import GptSimpleError, PluginError
from gpt_simple.hooks import HOOKS, NoConfig, StepEnd
from gpt_simple.hooks.components import BUILTIN, Component, builtin_registry
from gpt_simple.plugin_host.discovery import installed, usable
from gpt_simple.plugin_host.lint import lint
from gpt_simple.plugin_host.loading import LoadedPlugin, PassedPlugin, load_plugin, name_passed
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.testing.faults import misbehaving
from gpt_simple.testing.host_sync import HostSync, no_host_sync
from gpt_simple.testing.recorder import Recorder
from gpt_simple.testing.tiny import Trained, train

Overrides = Mapping[str, Any] | None
TinyRun = Callable[..., Trained]
"""Takes the further plugins and options of ``train``."""


def check_contract(
    plugin: type[Plugin[Any]],
    *,
    overrides: Overrides = None,
    enable: tuple[str, ...] = (),
    observes: bool = True,
    beside: Sequence[PassedPlugin] = (),
) -> None:
    """Raise one AssertionError that lists everything that ``plugin`` breaks.

    Every component that it registers is built, trained and resumed; one whose configuration is refused is a warning.
    ``overrides`` are the dotted keys of the configuration that it and its components need. ``enable`` switches an
    installed plugin on by its name, instead of passing its class. ``observes=False`` is for a plugin that is meant to
    change training. ``beside`` are plugins that it requires or uses; installed ones that it requires are switched on
    without that.
    """
    found = violations(plugin, overrides=overrides, enable=enable, observes=observes, beside=beside)
    for text in found.untried:
        warnings.warn(f"{text}; give what it needs in overrides", stacklevel=2)
    if found.broken:
        lines = "\n".join(f"- {text}" for text in found.broken)
        raise AssertionError(f"{plugin.__name__} breaks the contract:\n{lines}")


@frozen
class Violations:
    """What ``plugin`` breaks, and the components that could not be tried because their configuration is refused."""

    broken: list[str]
    untried: list[str]


def violations(
    plugin: type[Plugin[Any]],
    *,
    overrides: Overrides = None,
    enable: tuple[str, ...] = (),
    observes: bool = True,
    beside: Sequence[PassedPlugin] = (),
) -> Violations:
    """What ``check_contract`` raises as one error, with the same arguments."""
    if mistakes := lint(plugin):
        raise AssertionError("\n".join(map(str, mistakes)))
    others = {*name_passed(beside, usable(installed()), ())}
    required = tuple(_required(plugin, {*others, *enable}))
    own = () if enable else (plugin,)
    run = partial(train, *beside, *own, overrides=overrides, enable=(*enable, *required))
    try:
        broken = list(_fails_in_a_hook(run))
    except GptSimpleError as error:
        raise AssertionError(f"{plugin.__name__}: a run of three steps fails: {error}") from error
    for check in (_reads_a_tensor_in_a_step, _leaves_things_open, _resumes_otherwise):
        broken += check(run)
    broken += _fails_when_others_fail(run, plugin)
    if observes:
        tables = tuple(f"plugins.{name}." for name in (*others, *required))
        kept = {k: v for k, v in (overrides or {}).items() if not k.startswith("plugins.") or k.startswith(tables)}
        if not _equal(train(*beside, overrides=kept, enable=required), run()):
            broken.append(
                "the trained weights differ from those of a run without it; is that meant? then observes=False"
            )
    untried: list[str] = []
    for part in _components(plugin):
        chosen = partial(run, overrides={**(overrides or {}), part.key: part.name})
        subject = f'with {part.key} = "{part.name}"'
        try:
            broken += [f"{subject} {text}" for text in (*_fails_in_a_hook(chosen), *_resumes_otherwise(chosen))]
        except PluginError as error:
            broken.append(f"{subject} a run fails: {error}")
        except GptSimpleError as error:
            untried.append(f"{part.kind} {part.name!r} was not tried: {error}")
    return Violations(broken, untried)


def _components(plugin: type[Plugin[Any]]) -> list[Component]:
    """The components that a plugin registers. A store keeps one run, and this suite makes several: it is left out."""
    registry = builtin_registry()
    LoadedPlugin(plugin.__name__, plugin, "", "").register_components(registry)
    return [part for part in registry.parts.values() if part.owner != BUILTIN and part.kind != "store"]


def _required(plugin: type[Plugin[Any]], given: set[str]) -> Iterator[str]:
    """The installed plugins that a plugin requires, and those that they require, without those in ``given``."""
    records = usable(installed())
    for name in plugin.requires:
        if name in records and name not in given:
            given.add(name)
            yield from (name, *_required(load_plugin(name, None, records[name]).cls, given))


class StopsAfterTwo(Plugin[NoConfig]):
    """Stops a run after two steps, with the schedule of the whole run."""

    @hookimpl
    def on_step_end(self, run: Run, event: StepEnd) -> None:
        if event.step == 2:
            run.control.stop("the contract suite stops here")


def _fails_in_a_hook(run: TinyRun) -> Iterator[str]:
    """Three steps with metrics, an evaluation and checkpoints."""
    for event in run().recorder.events("on_log"):
        if event.name == "plugin_failed":
            yield event.message


def _reads_a_tensor_in_a_step(run: TinyRun) -> Iterator[str]:
    found: list[str] = []

    def wrap(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = getattr(implementation, "__name__", "")
        if name not in HOOKS or not HOOKS[name].hot:
            return implementation

        @wraps(implementation)
        def guarded(*arguments: Any) -> Any:
            try:
                with no_host_sync():
                    return implementation(*arguments)
            except HostSync as error:
                found.append(f"{name} makes the device wait: {error}")
                return None

        return guarded

    run(wrap=wrap)
    yield from dict.fromkeys(found)


def _leaves_things_open(run: TinyRun) -> Iterator[str]:
    with TemporaryDirectory() as directory:
        threads = set(threading.enumerate())
        run(output_dir=directory)
        yield from (f"{Path(file).name} is still open after on_close" for file in _open_files(Path(directory)))
        if left := [thread.name for thread in set(threading.enumerate()) - threads]:
            yield f"threads are still running after on_close: {', '.join(left)}"


def _resumes_otherwise(run: TinyRun) -> Iterator[str]:
    """Two steps, a stop and two more give the weights of four, and the plugin's sets of them; its state is loaded."""
    with TemporaryDirectory() as directory:
        straight = run(max_steps=4)
        run(StopsAfterTwo, max_steps=4, output_dir=directory)
        try:
            resumed = run(max_steps=4, output_dir=directory)
        except PluginError as error:
            yield f"a resumed run fails: {error}"
            return
        if not _equal(straight, resumed):
            yield "a run that was stopped and resumed ends with other weights"
        for name, weights in _weight_sets(straight).items():
            if not _same(weights, _weight_sets(resumed).get(name, {})):
                yield f"a run that was stopped and resumed ends with other weights {name!r}"


def _fails_when_others_fail(run: TinyRun, plugin: type[Plugin[Any]]) -> Iterator[str]:
    """Another plugin ends the run with an error, so ``on_run_error`` and ``on_close`` are called."""
    recorder = Recorder()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(PluginError):
        run(misbehaving("on_step_end", "raises", on_error="abort"), recorder=recorder)
    yield from (failure for one in recorder.plugins if one.cls is plugin for failure in one.failures)


def _equal(one: Trained, other: Trained) -> bool:
    return _same(one.weights, other.weights)


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _weight_sets(trained: Trained) -> dict[str, dict[str, torch.Tensor]]:
    """The plugins' sets of weights in the last checkpoint."""
    store = Store(RunDir(trained.output_dir).checkpoints)
    last = store.list()[-1]
    return {name: store.load_tensors(last, weights_stem(name)) for name in store.weight_sets(last)}


def _open_files(directory: Path) -> list[str]:
    """Files under a directory that this process holds open; none on a system without ``/proc``."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return []
    targets = []
    for descriptor in descriptors.iterdir():
        with contextlib.suppress(OSError):
            targets.append(os.readlink(descriptor))
    return [target for target in targets if target.startswith(str(directory.resolve()))]
