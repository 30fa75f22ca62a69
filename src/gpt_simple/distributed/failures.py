"""Which process failed, found by the processes that are left and reported by one of them.

A process that fails records the root cause in the store before it leaves. The collectives of the others fail in turn:
these secondary failures are explained by the root cause, or stay silent. A process that was killed records nothing, and
one that hangs misses the roll call.
"""

from __future__ import annotations

import json
import os
import re
import time

import torch.distributed as dist
from attrs import frozen
from torch.distributed.distributed_c10d import PrefixStore

from gpt_simple.errors import ExitCode, GptSimpleError, PluginError, Problem, RankFailed, describe
from gpt_simple.launch.member import AGAIN

_COLLECTIVE = re.compile(r"gloo|NCCL|c10d", re.IGNORECASE)
_ROLL_CALL_SECONDS = 3.0
_LAST_READER_SECONDS = 10.0


@frozen
class FailureDetection:
    """The other processes, seen through the store at which they met, which needs no collective."""

    rank: int
    size: int
    timeout: float
    _store: PrefixStore

    def explain(self, error: Exception, step: int) -> Exception:
        """The error to raise: ``error`` itself if it is the root cause, else RankFailed with what is known of that."""
        if isinstance(error, RankFailed):
            return error
        lost = _lost_contact(error)
        try:
            if lost is None:
                self._record(error)
                return error
            explained = self._root_cause(lost, step)
            self._keep_store()
            return error if explained is lost else explained
        except (RuntimeError, ValueError):
            if lost is None:
                return error  # nobody is left to read the record
            # The store has gone with its process: torchrun's agent, or else process 0, which reports the failure then.
            message = f"lost the other processes in step {step + 1} ({_short(error)})"
            return RankFailed(message, hint=AGAIN, silent=not _has_agent())

    def _record(self, error: Exception) -> None:
        """Record ``error`` as the root cause, unless there is one already."""
        code = int(getattr(error, "exit_code", ExitCode.FAILURE))
        unexpected = (Problem(None, "", describe(error)),)
        problems = error.problems if isinstance(error, GptSimpleError) else unexpected
        self._store.compare_set("root cause", "", json.dumps([self.rank, code, problems]))

    def _root_cause(self, lost: Exception, step: int) -> Exception:
        if self._store.check(["root cause"]):
            rank, code, problems = json.loads(self._store.get("root cause"))
            return RankFailed(*(Problem(*each).within(f"process {rank} failed") for each in problems), exit_code=code)
        if "timed out" not in str(lost).lower():
            first = self._store.add("noticed", 1) == 1
            return RankFailed(f"a process died in step {step + 1} ({_short(lost)})", hint=AGAIN, silent=not first)
        missing = self._roll_call()
        if not missing:
            return lost
        names = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        reporter = min(rank for rank in range(self.size) if rank not in missing)
        message = f"{names} did not come to the end of step {step + 1}: waited {self.timeout:g} s"
        return RankFailed(message, hint=AGAIN, silent=self.rank != reporter, timed_out=True)

    def _roll_call(self) -> list[int]:
        """The ranks that did not time out: those that wait in a collective all do so at about the same time."""
        self._store.set(f"here/{self.rank}", "")
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        while True:
            missing = [rank for rank in range(self.size) if not self._store.check([f"here/{rank}"])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)

    def _keep_store(self) -> None:
        """Without an agent the store lives in process 0, which therefore leaves last: the others still read it."""
        gone = self._store.add("left", 1)
        deadline = time.monotonic() + _LAST_READER_SECONDS
        # The process that failed is never counted.
        while self.rank == 0 and not _has_agent() and gone < self.size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = self._store.add("left", 0)


def _has_agent() -> bool:
    """Whether the store belongs to torchrun's agent, which outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _lost_contact(error: Exception) -> Exception | None:
    """What a collective raised because another process is gone, if ``error`` comes from that."""
    if isinstance(error, PluginError):
        # A collective inside a hook. A broken connection of the plugin's own is a failure of the plugin.
        cause = error.__cause__
        return cause if isinstance(cause, Exception) and _is_of_collective(cause) else None
    return error if _is_of_collective(error) else None


def _is_of_collective(error: Exception) -> bool:
    """Gloo raises bare RuntimeErrors, which begin with a place in its sources. The compiler's own classes are none of
    them, whatever code they quote."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_COLLECTIVE.search(str(error))))


def _short(error: Exception) -> str:
    """The library's message without the place in its sources and its advice."""
    return re.sub(r"^\[\S*\]\s*", "", str(error)).splitlines()[0].partition(". ")[0][:200]
