"""When a process is lost: who it was, told once, by whoever is left.

A process that fails writes down why before it leaves; the others, whose collectives fail in turn, find that and leave
silently. One that was killed cannot write anything, and one that hangs does not come to the roll call.
"""

from __future__ import annotations

import json
import os
import re
import time

import torch.distributed as dist
from attrs import frozen
from torch.distributed.distributed_c10d import PrefixStore

from gpt_simple.errors import ExitCode, GptSimpleError, PluginError, Problem, RankFailed
from gpt_simple.launch.member import AGAIN

_CONTACT = re.compile(r"gloo|NCCL|c10d|TCPStore|connection|socket", re.IGNORECASE)
_COLLECTIVE = re.compile(r"gloo|NCCL|c10d")
_ROLL_CALL_SECONDS = 3.0
_SEE_OFF_SECONDS = 10.0


@frozen
class FailureDetection:
    """The other processes, seen through the store that they met at, which needs no collective."""

    rank: int
    size: int
    timeout: float
    _store: PrefixStore

    def explain(self, error: Exception, step: int) -> Exception:
        """The error to leave with: ``error`` itself if it began here, else RankFailed with what is known."""
        if isinstance(error, RankFailed):
            return error
        try:
            lost = _lost_contact(error)
            if lost is None:
                self._tell(error)
                return error
            explained = self._who(lost, step)
            self._see_off()
            return error if explained is lost else explained
        except (RuntimeError, ValueError):
            # The store has gone with its process: torchrun's agent, or else process 0, which has the message then.
            message = f"lost the other processes in step {step + 1} ({_short(error)})"
            return RankFailed(message, hint=AGAIN, silent=not _has_agent())

    def _see_off(self) -> None:
        """Without an agent the store lives in process 0: it leaves last, so that the others learn what happened."""
        gone = self._store.add("left", 1)
        deadline = time.monotonic() + _SEE_OFF_SECONDS
        # One of the processes is the one that failed, and does not come by here.
        while self.rank == 0 and not _has_agent() and gone < self.size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = self._store.add("left", 0)

    def _tell(self, error: Exception) -> None:
        code = int(getattr(error, "exit_code", ExitCode.FAILURE))
        unexpected = (Problem(type(error).__name__, "", str(error)),)
        problems = error.problems if isinstance(error, GptSimpleError) else unexpected
        # The first one is the cause.
        self._store.compare_set("failed", "", json.dumps([self.rank, code, problems]))

    def _who(self, error: Exception, step: int) -> Exception:
        if self._store.check(["failed"]):
            rank, code, problems = json.loads(self._store.get("failed"))
            return RankFailed(*(Problem(*each).within(f"process {rank} failed") for each in problems), exit_code=code)
        if "timed out" not in str(error).lower():
            first = self._store.add("mourners", 1) == 1
            return RankFailed(f"a process died in step {step + 1} ({_short(error)})", hint=AGAIN, silent=not first)
        missing = self._roll_call()
        if not missing:
            return error
        names = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        there = min(rank for rank in range(self.size) if rank not in missing)
        message = f"{names} did not come to the end of step {step + 1}: waited {self.timeout:g} s"
        return RankFailed(message, hint=AGAIN, silent=self.rank != there, timed_out=True)

    def _roll_call(self) -> list[int]:
        """The processes that do not wait for others, as all that do have timed out at about the same time."""
        self._store.set(f"here/{self.rank}", "")
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        while True:
            missing = [rank for rank in range(self.size) if not self._store.check([f"here/{rank}"])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)


def _has_agent() -> bool:
    """Whether the store belongs to torchrun's agent, which outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _lost_contact(error: Exception) -> Exception | None:
    """What a collective raised because another process is gone, if that is what ``error`` comes from."""
    if isinstance(error, PluginError):
        # A collective inside a hook. A connection of the plugin's own is another matter, and its failure.
        cause = error.__cause__
        return cause if isinstance(cause, RuntimeError) and _COLLECTIVE.search(str(cause)) else None
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _CONTACT.search(str(error)))
    return error if lost else None


def _short(error: Exception) -> str:
    """What the library said, without the place in its sources and its advice."""
    return re.sub(r"^\[\S*\]\s*", "", str(error)).splitlines()[0].partition(". ")[0][:200]
