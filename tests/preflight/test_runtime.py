"""How long a run takes: measured here or estimated for a GPU, and against the time that is granted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.cli.test_bad_input import snapshot
from tests.conftest import Shell
from tests.preflight.conftest import Check


def test_a_probe_measures_and_leaves_nothing_behind(check: Check, here: Path) -> None:
    before = snapshot(here)
    fields = check("--probe")["runtime"]["fields"]
    assert fields["measured"]
    assert fields["tokens_per_second"] == pytest.approx(64 / fields["step_seconds"])
    assert snapshot(here) == before


def test_without_a_probe_a_gpu_gives_a_named_estimate(check: Check) -> None:
    found = check("--device", "a100", "--mfu", "0.5")
    assert not found["runtime"]["fields"]["measured"]
    assert "an estimate: 50%" in found["runtime"]["message"]
    half = check("--device", "a100", "--mfu", "0.25")["runtime"]["fields"]["step_seconds"]
    assert half == pytest.approx(2 * found["runtime"]["fields"]["step_seconds"])


def test_the_steps_of_a_warm_up_take_time_by_their_tokens(check: Check) -> None:
    stages = "--training.warmup_stages=[{steps = 500000000, gradient_accumulation_steps = 1}]"
    more = ["--device=a100", "--training.gradient_accumulation_steps=4", "--training.max_steps=1000000000"]
    more += ["--training.eval_steps=0", "--training.save_steps=0"]
    plain, warm = (check(*more, *extra)["runtime"]["fields"] for extra in ([], [stages]))
    assert warm["step_seconds"] == plain["step_seconds"]
    assert plain["total_seconds"] == pytest.approx(1e9 * plain["step_seconds"], rel=1e-4)
    assert warm["total_seconds"] == pytest.approx(0.625e9 * plain["step_seconds"], rel=1e-4)


def test_checkpointing_costs_another_forward_pass(check: Check) -> None:
    def seconds(every: str) -> float:
        arguments = ["--device=h100", "--model.n_layer=3", f"--training.gradient_checkpointing={every}"]
        answer: float = check(*arguments)["runtime"]["fields"]["step_seconds"]
        return answer

    assert seconds("true") == pytest.approx(seconds("false") * 4 / 3)
    assert seconds("2") == pytest.approx(seconds("false") * (3 + 2 / 3) / 3)


def test_too_little_time_is_a_warning(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 60))
    arguments = ["--device", "h100", "--training.max_steps=999999999"]
    assert "SLURM grants 0:01:00" in check(*arguments)["time-short"]["message"]
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert "time-short" not in check(*arguments)


def test_a_budget_that_the_run_refuses_is_refused(
    check: Check, shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_simple.cli.run.BEGAN", time.monotonic())  # this process is older than the budget
    arguments = ["--model.vocab_size=4_000_000", "--training.walltime_reserve_seconds=0"]
    refused = check(*arguments, "--training.max_runtime_seconds=20", code=2)["budget-refused"]
    assert refused["place"] == "--training.max_runtime_seconds"
    assert refused["message"].startswith("23 s are kept for the first checkpoint, of 1.4 GiB")
    ended = shell("run", "config.toml", *arguments, "--training.max_runtime_seconds=20")
    assert (ended.code, refused["message"] in ended.err) == (2, True)
    assert not (here / "out").exists()
    assert "budget-refused" not in check(*arguments, "--training.max_runtime_seconds=40")


@pytest.mark.parametrize(("seconds", "words"), [("20", "leaves nothing of the 20 s"), ("soon", "'soon'")])
def test_a_budget_of_the_environment_is_checked(
    check: Check, monkeypatch: pytest.MonkeyPatch, seconds: str, words: str
) -> None:
    monkeypatch.setenv("GPT_SIMPLE_MAX_RUNTIME", seconds)
    assert words in check(code=2)["budget-refused"]["message"]


def test_a_probe_that_cannot_run_is_refused_as_the_run_would_be(check: Check) -> None:
    if not torch.cuda.is_available():
        assert "fp16" in check("--probe", "--training.mixed_precision=fp16", code=2)["runtime-refused"]["message"]


def test_only_the_steps_that_are_left_take_time(check: Check, shell: Shell) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    whole = check("--device", "h100", "--training.max_steps=12", "--force")["runtime"]["fields"]
    rest = check("--device", "h100", "--training.max_steps=12")["runtime"]["fields"]
    assert (whole["steps_left"], rest["steps_left"]) == (12, 8)
    assert rest["total_seconds"] < whole["total_seconds"]
    assert check("--probe")["runtime"]["fields"]["total_seconds"] == 0


def test_a_probe_that_does_not_fit_is_not_made(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.preflight.runtime.free_memory", lambda: 2**10)
    assert "are free here" in check("--probe", code=2)["runtime-refused"]["message"]


def test_an_unknown_gpu_is_reported_once(shell: Shell) -> None:
    ended = shell("validate", "config.toml", "--device", "foo")
    assert ended.out.count("--device foo") == 1
    assert "1 error," in ended.out


@pytest.mark.compiler
@pytest.mark.slow
def test_a_compiled_probe_leaves_no_cache(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert check("--probe", "--training.compile=true")["runtime"]["fields"]["measured"]
    assert not (tmp_path / "inductor").exists()
