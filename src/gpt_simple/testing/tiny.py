"""A real run that takes a fraction of a second: 16 wide, one block, rows of 16 bytes of generated stories."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from attrs import frozen

from gpt_simple.config.types import fields_of
from gpt_simple.engine.compatibility import keep_values_of_run
from gpt_simple.errors import GptSimpleError
from gpt_simple.hooks.components import CONFIG_KEY, SECTION_FIELDS, Component, Registry, builtin_registry
from gpt_simple.hooks.plugin import NoConfig, Plugin
from gpt_simple.hooks.specs import hookimpl
from gpt_simple.job.result import TrainResult
from gpt_simple.job.train import train as train_spec
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.host import PluginHost
from gpt_simple.plugin_host.loading import PassedPlugin
from gpt_simple.spec import resolve_spec
from gpt_simple.testing.recorder import Recorder

TINY: Mapping[str, Any] = MappingProxyType(
    {
        "model.n_embd": 16,
        "model.n_layer": 1,
        "model.n_head": 2,
        "data.source": "stories",
        "data.tokenizer": "bytes",
        "data.max_length": 16,
        "data.max_documents": 40,
        "data.num_workers": 0,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 1,
        "training.per_device_batch_size": 2,
        "training.gradient_accumulation_steps": 2,
        "training.compile": False,
        "training.gradient_checkpointing": False,
        "training.logging_steps": 1,
        "training.eval_steps": 2,
        "training.max_eval_batches": 1,
        "training.save_steps": 2,
    }
)
"""Its configuration; three steps call every hook of a run but those of a resume and of an error."""

QUIET = ("console", "sample")
"""Built-in plugins that only print, which a tiny run leaves out."""


@frozen
class Trained:
    """A finished tiny run. ``recorder`` has every call of a hook and the final weights."""

    result: TrainResult
    output_dir: Path
    recorder: Recorder
    host: PluginHost
    _directory: tempfile.TemporaryDirectory[str] | None = None

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The model's state at the end, under the raw names of its parameters."""
        return self.recorder.weights

    @property
    def failed(self) -> list[str]:
        """Names of the plugins that were switched off because they failed."""
        return [plugin.name for plugin in self.host.plugins if plugin.failed]


def train(
    *plugins: PassedPlugin,
    component: Component | Sequence[Component] = (),
    output_dir: Path | str | None = None,
    max_steps: int = 3,
    overrides: Mapping[str, Any] | None = None,
    enable: tuple[str, ...] = (),
    recorder: Recorder | None = None,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Trained:
    """Train the tiny model with these plugins (classes or instances) beside the built-in ones.

    ``component`` is a part that the run uses, or several: ``Component("optimizer", "lion", build, LionConfig)``. A
    section has the tiny value of every field that the component's own class has, too. ``overrides`` are dotted keys of
    the configuration, the plugins' own too: ``{"plugins.csvlog.path": "a.csv"}``. ``enable`` names installed plugins,
    as ``-p`` does. An ``output_dir`` that holds a run is resumed; without one a temporary directory exists as long as
    the result. Pass a ``recorder`` to read it after a run that raises. ``wrap`` is put around every implementation of a
    hook. Torch has one thread meanwhile. Raises what ``gpt_simple.train`` raises.
    """
    directory = None if output_dir else tempfile.TemporaryDirectory(prefix="gpt-simple-testing-")
    root = Path(output_dir or directory.name)  # type: ignore[union-attr]
    recorder = recorder or Recorder()
    components = [component] if isinstance(component, Component) else [*component]
    if components:
        plugins = (*plugins, _registering(components))
    chosen = {part.key: part.name for part in components} | dict(overrides or {})
    switches = Switches(enable, tuple(name for name in QUIET if name not in enable))
    with _test_process():
        tiny = _tiny_values(chosen, plugins, switches)
        values = {**tiny, "training.output_dir": str(root), "training.max_steps": max_steps, **chosen}
        spec = resolve_spec(None, sections=_nested(values), switches=switches, plugins=[*plugins, recorder])
        spec = keep_values_of_run(spec, force=False)
        recorder.plugins, spec.host.wrap = spec.host.plugins, wrap
        result = train_spec(spec)
    return Trained(result, root, recorder, spec.host, directory)


def _registering(components: Sequence[Component]) -> type[Plugin[NoConfig]]:
    """A plugin that brings these components and nothing else."""

    class Components(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            for part in components:
                registry.add(part.kind, part.name, part.target, config=part.config)

    return Components


def _tiny_values(chosen: Mapping[str, Any], plugins: Sequence[PassedPlugin], switches: Switches) -> dict[str, Any]:
    """``TINY`` without the keys that the own class of a chosen component does not have."""
    names = {kind: chosen[key] for kind, key in CONFIG_KEY.items() if kind in SECTION_FIELDS and key in chosen}
    if not names:
        return dict(TINY)
    # Errors are raised when the whole configuration is resolved.
    host = PluginHost.activate({}, set_keys=lambda _: False, switches=switches, extra=plugins, errors=[])
    registry = builtin_registry()
    with suppress(GptSimpleError):
        host.register_components(registry)
    unknown = set()
    for kind, name in names.items():
        if (part := registry.parts.get((kind, name))) is not None and part.config is not None:
            section, known = part.key.partition(".")[0], {spec.name for spec in fields_of(part.config)}
            unknown |= {key for key in TINY if key.startswith(f"{section}.") and key.partition(".")[2] not in known}
    return {key: value for key, value in TINY.items() if key not in unknown}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections from dotted keys."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        table = sections
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return sections


@contextmanager
def _test_process() -> Iterator[None]:
    """One thread, which is fastest for tiny tensors and tests side by side, and a data cache that is not the user's."""
    threads = torch.get_num_threads()
    variables = {} if "GPT_SIMPLE_CACHE" in os.environ else {"GPT_SIMPLE_CACHE": _cache_directory().name}
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name in variables:
            del os.environ[name]


@cache
def _cache_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gpt-simple-testing-cache-")
