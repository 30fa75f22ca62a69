"""The suite that every plugin should pass."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import frozen

from gpt_simple import Plugin, Run, hookimpl
from gpt_simple.errors import GptSimpleError, PluginError
from gpt_simple.hooks import HOOKS, NoConfig, StepEnd
from gpt_simple.plugin_host.lint import lint
from gpt_simple.testing.faults import misbehaving
from gpt_simple.testing.host_sync import HostSync, no_host_sync
from gpt_simple.testing.recorder import Recorder
from gpt_simple.testing.tiny import Trained, train

Overrides = Mapping[str, Any] | None


def check_contract(
    plugin: type[Plugin[Any]], *, overrides: Overrides = None, enable: tuple[str, ...] = (), observes: bool = True
) -> None:
    """Raise one AssertionError that lists everything that ``plugin`` breaks.

    ``overrides`` are the dotted keys of the configuration that it needs. ``enable`` switches an installed plugin on by
    its name, instead of passing its class. ``observes=False`` is for a plugin that is meant to change training.
    """
    if mistakes := lint(plugin):
        raise AssertionError("\n".join(map(str, mistakes)))
    subject = _Subject(plugin, overrides or {}, enable)
    try:
        broken = list(_fails_in_a_hook(subject))
    except GptSimpleError as error:
        raise AssertionError(f"{plugin.__name__}: a run of three steps fails: {error}") from error
    checks = [_reads_a_tensor_in_a_step, _leaves_things_open, _resumes_otherwise, _fails_when_others_fail]
    for check in (*checks, *([_changes_training] if observes else [])):
        broken += check(subject)
    if broken:
        raise AssertionError(f"{plugin.__name__} breaks the contract:\n" + "\n".join(f"- {text}" for text in broken))


class StopsAfterTwo(Plugin[NoConfig]):
    """Stops a run after two steps, with the schedule of the whole run."""

    @hookimpl
    def on_step_end(self, run: Run, event: StepEnd) -> None:
        if event.step == 2:
            run.control.stop("the contract suite stops here")


@frozen
class _Subject:
    """The plugin under test, and how to run it."""

    plugin: type[Plugin[Any]]
    overrides: Mapping[str, Any]
    enable: tuple[str, ...]

    def train(self, *others: type[Plugin[Any]], **options: Any) -> Trained:
        passed = others if self.enable else (self.plugin, *others)
        return train(*passed, overrides=self.overrides, enable=self.enable, **options)


def _fails_in_a_hook(subject: _Subject) -> Iterator[str]:
    """Three steps with metrics, an evaluation and checkpoints."""
    for event in subject.train().recorder.events("on_log"):
        if event.name == "plugin_failed":
            yield event.message


def _reads_a_tensor_in_a_step(subject: _Subject) -> Iterator[str]:
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

    subject.train(wrap=wrap)
    yield from dict.fromkeys(found)


def _leaves_things_open(subject: _Subject) -> Iterator[str]:
    with TemporaryDirectory() as directory:
        threads = set(threading.enumerate())
        subject.train(output_dir=directory)
        yield from (f"{Path(file).name} is still open after on_close" for file in _open_files(Path(directory)))
        if left := [thread.name for thread in set(threading.enumerate()) - threads]:
            yield f"threads are still running after on_close: {', '.join(left)}"


def _resumes_otherwise(subject: _Subject) -> Iterator[str]:
    """Two steps, a stop and two more give the weights of four; the plugin's state is saved and loaded on the way."""
    with TemporaryDirectory() as directory:
        straight = subject.train(max_steps=4)
        subject.train(StopsAfterTwo, max_steps=4, output_dir=directory)
        try:
            resumed = subject.train(max_steps=4, output_dir=directory)
        except PluginError as error:
            yield f"a resumed run fails: {error}"
            return
        if not _equal(straight, resumed):
            yield "a run that was stopped and resumed ends with other weights"


def _fails_when_others_fail(subject: _Subject) -> Iterator[str]:
    """Another plugin ends the run with an error, so ``on_run_error`` and ``on_close`` are called."""
    recorder = Recorder()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(PluginError):
        subject.train(misbehaving("on_step_end", "raises", on_error="abort"), recorder=recorder)
    for plugin in recorder.plugins:
        if plugin.cls is subject.plugin:
            yield from map(str, plugin.failures)


def _changes_training(subject: _Subject) -> Iterator[str]:
    overrides = {key: value for key, value in subject.overrides.items() if not key.startswith("plugins.")}
    if not _equal(train(overrides=overrides), subject.train()):
        yield "the trained weights differ from those of a run without it; is that meant? then observes=False"


def _equal(one: Trained, other: Trained) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(value, other.weights[name]) for name, value in one.weights.items()
    )


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
