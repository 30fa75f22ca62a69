"""A run that is over holds no tensor, whatever its end, without waiting for Python to look for cycles.

A second run in a notebook or a sweep must fit into the memory of the first.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import Plugin, PluginError, Run, hookimpl
from gpt_simple.hooks import NoConfig, Registry
from gpt_simple.model.gpt import build
from tests.tiny import TinyRun


class Fails(Plugin[NoConfig]):
    on_error = "abort"

    @hookimpl
    def on_step_end(self, run: Run, event: Any) -> None:
        raise RuntimeError("no more")


class SwitchedOff(Plugin[NoConfig]):
    on_error = "disable"

    @hookimpl
    def on_step_end(self, run: Run, event: Any) -> None:
        raise RuntimeError("not this one")


class Interrupted(Plugin[NoConfig]):
    @hookimpl
    def on_step_end(self, run: Run, event: Any) -> None:
        raise KeyboardInterrupt


class Large(Plugin[NoConfig]):
    """Its model runs out of memory in the first backward pass."""

    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("model", "large", cls.build)

    @staticmethod
    def build(config: Any, **sizes: Any) -> torch.nn.Module:
        model = build(config, **sizes)
        model.token_embedding.weight.register_hook(refuse)
        return model


def refuse(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("no memory left")


def tensors() -> list[torch.Tensor]:
    return [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]


@pytest.mark.parametrize(
    ("plugins", "options", "error"),
    [
        ((), {}, ()),
        ((SwitchedOff,), {}, ()),
        ((Fails,), {}, PluginError),
        ((Interrupted,), {}, KeyboardInterrupt),
        ((Large,), {"model__name": "large"}, Exception),
        ((), {"training__resume": "nowhere"}, Exception),
    ],
    ids=["completed", "a plugin is off", "a plugin fails", "Ctrl-C", "out of memory", "refused"],
)
def test_a_run_that_is_over_holds_no_tensors(
    plugins: tuple[Any, ...], options: dict[str, Any], error: Any, tiny: TinyRun, tmp_path: Path
) -> None:
    tiny("before", training__max_steps=1)  # what torch and the data cache make once
    gc.collect()
    before = {id(item) for item in tensors()}
    gc.disable()
    try:
        with suppress(error):
            tiny("run", plugins=plugins, training__max_steps=3, **options)
            assert not error
        if error:  # its frames refer to it, and the next launch lets go of them
            tiny("next", training__max_steps=1)
        assert [item.shape for item in tensors() if id(item) not in before] == []
    finally:
        gc.enable()
