"""How long a run takes: measured here or estimated for a card, and against what time there is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.cli.test_bad_input import snapshot
from tests.validate.conftest import Check


def test_a_probe_measures_and_leaves_nothing_behind(check: Check, here: Path) -> None:
    before = snapshot(here)
    fields = check("--probe")["runtime"]["fields"]
    assert fields["measured"]
    assert fields["tokens_per_second"] == pytest.approx(64 / fields["step_seconds"])
    assert snapshot(here) == before


def test_without_a_probe_a_card_gives_an_estimate_that_says_so(check: Check) -> None:
    found = check("--device", "a100", "--mfu", "0.5")
    assert not found["runtime"]["fields"]["measured"]
    assert "an estimate: 50%" in found["runtime"]["message"]
    half = check("--device", "a100", "--mfu", "0.25")["runtime"]["fields"]["step_seconds"]
    assert half == pytest.approx(2 * found["runtime"]["fields"]["step_seconds"])


def test_checkpointing_costs_another_forward_pass(check: Check) -> None:
    plain = check("--device", "h100")["runtime"]["fields"]["step_seconds"]
    checkpointed = check("--device", "h100", "--training.gradient_checkpointing=true")["runtime"]["fields"]
    assert checkpointed["step_seconds"] == pytest.approx(plain * 4 / 3)


def test_too_little_time_is_a_warning(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 60))
    arguments = ["--device", "h100", "--training.max_steps=999999999"]
    assert "SLURM grants 0:01:00" in check(*arguments)["time-short"]["message"]
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert "time-short" not in check(*arguments)


def test_a_probe_that_cannot_run_is_refused_as_the_run_would_be(check: Check) -> None:
    if not torch.cuda.is_available():
        assert "fp16" in check("--probe", "--training.mixed_precision=fp16", code=2)["runtime-refused"]["message"]
