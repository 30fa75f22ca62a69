"""Stops while the processes of a run start.

A thread inside a collective runs no signal handlers, and a collective ends only if all processes take part. So until
the first step every collective runs in a thread of its own while the main thread waits for it and for signals. A stop
of one process reaches the others through the store at which they meet, over a connection of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, Protocol, TypeVar

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

T = TypeVar("T")

PERIOD_SECONDS = 0.2
"""How often a process asks the store whether another one was stopped."""

_ANNOUNCE_SECONDS = 1.0
"""How long a process that is stopped tries to announce that to the others, which may not be there."""

_KEY = "stopped"


class Signals(Protocol):
    """The signals that ask this process to stop."""

    @property
    def reason(self) -> str:
        """The first signal, empty before."""

    def stop_now(self, reason: str) -> NoReturn:
        """Leave the launch."""


class StartUp:
    """Collectives until ``end`` is called: ``wait`` leaves them when this process or another one is asked to stop."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._is_over = False
        self._noticed: float | None = None
        self._announced, self._heard = threading.Event(), threading.Event()

    def wait(self, collective: Callable[[], T]) -> T:
        """The result of ``collective``. Calls ``signals.stop_now``, and abandons it, on a stop of any process."""
        if self._is_over:
            return collective()
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(collective())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, name="collective", daemon=True).start()
        while not wait_for([done], PERIOD_SECONDS / 2).done:
            if self._heard.is_set() or (self._signals.reason and self._is_announced(0.0)):
                self._stop()
        if done.exception() is not None and self._left_by_others():
            self._stop()
        return done.result()

    def end(self) -> None:
        """From now on the processes decide together when they stop."""
        self._is_over = True

    def _is_announced(self, seconds: float) -> bool:
        """Whether the others can hear of this process's stop, or have had the time to; waits up to ``seconds``."""
        if self._noticed is None:
            self._noticed = time.monotonic()
        left = self._noticed + _ANNOUNCE_SECONDS - time.monotonic()
        return self._announced.wait(max(0.0, min(seconds, left))) or left <= seconds

    def _left_by_others(self) -> bool:
        """Whether a collective failed because others have stopped."""
        return bool(self._signals.reason) or self._heard.wait(2 * PERIOD_SECONDS)

    def _stop(self) -> NoReturn:
        self._signals.stop_now(self._signals.reason or "another process was asked to stop")

    def watch(self, timeout: float) -> None:
        """Start to exchange stops with the other processes. ``timeout``: seconds until the store must be there."""
        threading.Thread(target=self._watch, args=(timeout,), name="stop-watch", daemon=True).start()

    def _watch(self, timeout: float) -> None:
        # Without a store, or after its process has ended, there is nobody to exchange with.
        with suppress(RuntimeError):
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            server = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
            # The store of an agent outlives the processes that it starts again.
            store = PrefixStore(f"gpt_simple/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
            while not self._is_over:
                if self._signals.reason:
                    store.set(_KEY, "")
                    self._announced.set()
                    return
                if store.check([_KEY]):
                    self._heard.set()
                    return
                time.sleep(PERIOD_SECONDS)

    def close(self) -> None:
        """End. A process that was stopped stays until the others can have heard of it: its store ends with it."""
        if self._signals.reason and not self._is_over:
            self._is_announced(_ANNOUNCE_SECONDS)
            time.sleep(2 * PERIOD_SECONDS)
        self.end()


@contextmanager
def start_up(signals: Signals, size: int, timeout: float) -> Iterator[StartUp]:
    """The start of a launch of ``size`` processes, until ``end`` is called on what this yields."""
    starting = StartUp(signals)
    if size == 1:
        starting.end()
    else:
        starting.watch(timeout)
    try:
        yield starting
    finally:
        starting.close()
