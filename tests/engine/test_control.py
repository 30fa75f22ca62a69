"""Wishes become decisions by one vote, and a wish to leave is final."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt_simple.engine.control import Control
from gpt_simple.errors import PluginError


def test_nothing_asked_for_is_nothing_decided() -> None:
    verdict = Control().vote(None)
    assert not verdict.leave
    assert not verdict.save


def test_the_first_reason_counts_and_is_used_once() -> None:
    control = Control()
    control.save("first")
    control.save("second")
    assert control.vote(None).save == "first"
    assert control.vote(None).save == ""


def test_a_stop_stays() -> None:
    control = Control()
    control.stop("SIGTERM")
    assert [control.vote(None).stop, control.vote(None).stop] == ["SIGTERM", "SIGTERM"]


@pytest.mark.parametrize("flag", ["yes", 1, True, torch.ones(()), torch.tensor([True]), torch.ones((), device="meta")])
def test_a_flag_that_is_none_is_refused(flag: Any) -> None:
    control = Control()
    with pytest.raises(PluginError, match=r"skip_step was given a .*; expected a 0-d bool tensor"):
        control.skip_step(flag)
    assert control.skip is None


@pytest.mark.parametrize("wish", ["save", "evaluate", "stop", "halt"])
@pytest.mark.parametrize("reason", [None, "", 3, True])
def test_a_wish_without_a_reason_is_refused(wish: str, reason: Any) -> None:
    control = Control()
    with pytest.raises(PluginError, match="as a reason; expected text that says why"):
        getattr(control, wish)(reason)
    assert control.vote(None) == Control().vote(None)


class Others:
    """Voters of which another one wants to stop and has seen a plugin fail."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def agree(self, flags: Any) -> list[int]:
        self.seen.append([int(flag) for flag in flags])
        return [1, 0, 1, 0, 0, 0, 1]

    def gather(self, value: Any) -> list[Any]:
        return [value, ["", "", "SIGTERM", "", ""]]


def test_another_process_can_decide_and_says_why() -> None:
    others, control = Others(), Control(plugins=("console", "wandb"))
    control.save("mine")
    control.switch_off("console")
    verdict = control.vote(others)
    assert others.seen == [[1, 0, 0, 0, 0, 1, 0]]
    assert (verdict.save, verdict.stop, verdict.leave) == ("mine", "SIGTERM", True)
    assert verdict.off == ("wandb",)
