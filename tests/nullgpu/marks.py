"""A plugin that writes the beginning and the end of each step into the log of the null GPU."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from gpt_simple.hooks import NoConfig, Plugin, hookimpl

if TYPE_CHECKING:
    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev


class Marks(Plugin[NoConfig]):
    """Two lines a step, which are no events of the device."""

    @hookimpl
    def on_step_start(self, run: Run, event: ev.StepStart) -> None:
        mark(f"step {event.step}")

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        mark(f"end of step {event.step}")


def mark(what: str) -> None:
    ctypes.CDLL("libcuda.so.1").nullgpu_mark(what.encode())
