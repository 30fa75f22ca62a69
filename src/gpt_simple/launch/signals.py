"""Handlers of the signals that ask for a stop.

A handler only calls back and returns, so it is safe at any moment. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from gpt_simple.errors import ExitCode

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

ONE_PRESS_SECONDS = 0.3
"""Two SIGINTs within this time are one press: Ctrl-C can reach a process from the terminal and from a launcher."""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None], *, is_last: bool = False) -> Iterator[None]:
    """Within, ``handler`` gets the signals that ask for a stop. Earlier handlers are restored afterwards.

    ``is_last``: the signals are ignored afterwards, because the work is done and its exit code must not change.
    A SIGHUP that this process ignores, as under ``nohup``, stays ignored. The parent process may have blocked signals:
    they are unblocked within, also for the processes that are started there.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in STOPPING if number != signal.SIGHUP or not is_ignored]
    before: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, earlier in before.items():
            # None stands for a handler that was not installed from Python and cannot be restored from it.
            signal.signal(number, signal.SIG_IGN if is_last else earlier if earlier is not None else signal.SIG_DFL)


@contextmanager
def stop_on_signals(
    stop: Callable[[str], None], parting: Callable[[], object] = lambda: None, *, is_last: bool = False
) -> Iterator[None]:
    """Within, call ``stop`` with the name of each signal that arrives. ``is_last``: as for ``handling``.

    ``parting`` is called, once, before a second Ctrl-C ends the process. Outside the main thread, where Python allows
    no handlers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[float] = []
    leaving = False

    def leave() -> NoReturn:
        nonlocal leaving
        again, leaving = leaving, True
        try:
            if not again:
                os.write(2, b"\nsecond Ctrl-C: leaving at once, without a checkpoint of the last steps\n")
                parting()
        finally:
            os._exit(ExitCode.FORCED)

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if pressed and now - pressed[0] > ONE_PRESS_SECONDS:
                leave()
            pressed.append(now)
        stop(signal.Signals(number).name)

    with handling(handle, is_last=is_last):
        yield
