"""Wishes become decisions by one vote, and a wish to leave is final."""

from __future__ import annotations

from gpt_simple.engine.control import Control


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


def test_another_process_can_decide() -> None:
    seen: list[list[int]] = []

    def agree(flags: object) -> list[int]:
        seen.append(list(flags))  # type: ignore[call-overload]
        return [1, 0, 1, 0, 0]

    control = Control()
    control.save("mine")
    verdict = control.vote(agree)
    assert seen == [[1, 0, 0, 0, 0]]
    assert (verdict.save, verdict.stop, verdict.leave) == ("mine", "another process", True)
