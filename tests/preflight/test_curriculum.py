"""Buckets and phases: the findings agree with the order of samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_simple import Plugin, hookimpl
from gpt_simple.config.schema import Phase
from gpt_simple.data.mixture import Mixture, mixture
from gpt_simple.hooks import events as ev
from gpt_simple.job.train import train
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.spec import resolve_spec
from tests.conftest import CONFIG, Shell
from tests.data.conftest import write_dataset
from tests.preflight.conftest import Check

__all__ = ["write_dataset"]

BUCKETS = {"books": 40, "web": 300}
PHASES = (Phase(40 * 8, {"books": 1.0, "web": 1.0}), Phase(8, {"books": 1.0, "web": 3.0}))


def order(on_exhaustion: str) -> Mixture:
    return mixture(BUCKETS, PHASES, on_exhaustion, max_length=8, seed=3)


@pytest.mark.parametrize("on_exhaustion", ["repeat", "halt", "renormalise"])
@pytest.mark.parametrize("samples", [0, 1, 39, 40, 41, 97, 130])
def test_rows_taken_are_those_that_the_order_gives(on_exhaustion: str, samples: int) -> None:
    mix = order(on_exhaustion)
    samples = samples if mix.total is None else min(samples, mix.total)
    taken = mix.taken(samples)
    assert sum(taken) == samples
    if samples:
        books = int((mix.locate(np.arange(samples)) < BUCKETS["books"]).sum())
        assert taken == (books, samples - books)


@pytest.fixture
def two_buckets(here: Path, write_dataset: Callable[..., Path]) -> Path:
    documents = {"books": [[5, 6, 7] * 20] * 4, "web": [[9, 8, 7] * 30] * 60}
    directory = write_dataset(train=documents, val={"all": [[5, 6, 7] * 50]})
    phases = (
        f'path = "{directory}"\nmax_length = 32\n'
        "[[data.curriculum]]\nduration_tokens = 640\nmix = {books = 1, web = 1}\n"
        "[[data.curriculum]]\nduration_tokens = 640\nmix = {web = 1}\n"
    )
    text = CONFIG.replace('source = "stories"\n', "").replace("max_length = 32\nmax_documents = 200\n", phases)
    (here / "config.toml").write_text(text)
    return directory


def test_a_bucket_that_is_read_whole_is_named_with_its_step(check: Check, two_buckets: Path) -> None:
    found = check("--training.max_steps=50")
    assert found["data"]["fields"]["buckets"] == {"books": 8, "web": 171}
    read = found["buckets"]["fields"]["epochs"]
    assert read["books"] * 8 + read["web"] * 171 == pytest.approx(100)
    fields = found["bucket-ends"]["fields"]
    assert fields["bucket"] == "books"
    assert 8 <= fields["step"] * 2 <= 20
    assert "bucket-ends" not in check("--training.max_steps=2")


class Rows(Plugin):  # type: ignore[type-arg]
    """Which bucket every row of a run was of, by its tokens."""

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.seen: list[str] = []

    @hookimpl
    def on_batch(self, run: object, event: ev.BatchReady) -> None:
        self.seen += ["books" if 6 in row else "web" for row in event.batch.input_ids.tolist()]


Read = Callable[..., tuple[list[str], int]]


@pytest.fixture
def read(two_buckets: Path, capfd: pytest.CaptureFixture[str]) -> Read:
    """The buckets of the rows that a run reads, and the step it ends with."""

    def run(*arguments: str) -> tuple[list[str], int]:
        rows = Rows()
        pairs = [(key, value) for key, _, value in (text.removeprefix("--").partition("=") for text in arguments)]
        result = train(resolve_spec("config.toml", overrides=pairs, plugins=[rows], switches=Switches(no_plugins=True)))
        capfd.readouterr()  # its warnings
        return rows.seen, result.steps

    return run


WARMUP = "[{steps = 3, gradient_accumulation_steps = 2}, {steps = 2}, {steps = 2, gradient_accumulation_steps = 3}]"


@pytest.mark.parametrize("warmup", ["[]", WARMUP])
@pytest.mark.parametrize("on_exhaustion", ["repeat", "halt", "renormalise"])
def test_findings_on_buckets_and_phases_match_what_a_run_reads(
    check: Check, read: Read, on_exhaustion: str, warmup: str
) -> None:
    phases = "[{duration_tokens=640, mix={books=1,web=4}}, {duration_tokens=640, mix={books=1,web=1}}]"
    arguments = [f"--data.on_exhaustion={on_exhaustion}", "--training.max_steps=30", f"--data.curriculum={phases}"]
    arguments.append(f"--training.warmup_stages={warmup}")
    found = check(*arguments)
    seen, steps = read(*arguments)
    assert found["phase"]["fields"]["tokens"] == {name: 32 * seen[20:].count(name) for name in ("books", "web")}
    assert found["buckets"]["fields"]["epochs"]["books"] * 8 == pytest.approx(seen.count("books"))
    if on_exhaustion != "repeat":
        assert f"after step {steps} of 30" in found.get("data-end-early", {"message": "after step 30 of 30"})["message"]
    if seen.count("books") >= 8:
        last = [number for number, name in enumerate(seen) if name == "books"][7]
        sizes = [2] * 30 if warmup == "[]" else [4] * 3 + [2] * 2 + [6] * 2 + [2] * 23
        ends = [sum(sizes[: step + 1]) for step in range(30)]
        assert found["bucket-ends"]["fields"]["step"] == 1 + next(step for step, end in enumerate(ends) if last < end)


def test_a_resume_with_another_batch_counts_from_its_position(check: Check, read: Read) -> None:
    first, _ = read("--training.max_steps=3")
    arguments = ["--data.on_exhaustion=halt", "--training.max_steps=30", "--training.per_device_batch_size=3"]
    found = check(*arguments)
    rest, steps = read(*arguments)
    seen = first + rest
    assert f"after step {steps} of 30" in found["data-end-early"]["message"]
    assert found["config"]["message"].endswith(f"{(6 + 27 * 3) * 32:,} tokens")
    assert found["phase"]["fields"]["tokens"] == {name: 32 * seen.count(name) for name in ("books", "web")}


def test_rows_of_best_fit_are_a_guess_until_they_are_packed(check: Check, read: Read) -> None:
    packed = [
        "--data.packing=best_fit",
        "--data.overlap_size=8",
        "--data.on_exhaustion=halt",
        "--training.max_steps=40",
        "--training.per_device_batch_size=16",
    ]
    guessed = check(*packed)
    assert "after about step" in guessed["data-end-early"]["message"]
    _, steps = read(*packed)
    found = check(*packed, "--force")
    assert f"after step {steps} of 40" in found["data-end-early"]["message"]
    assert sum(found["data"]["fields"]["buckets"].values()) > sum(guessed["data"]["fields"]["buckets"].values())


def test_a_phase_that_the_run_does_not_reach_is_a_warning(check: Check, two_buckets: Path) -> None:
    assert "phase-never-reached" in check("--training.max_steps=10")
    assert "phase-never-reached" not in check("--training.max_steps=11")


def test_warnings_of_the_data_come_at_the_start_of_a_run_too(shell: Shell, two_buckets: Path) -> None:
    arguments = ["config.toml", "--training.max_steps=4", "--training.eval_steps=1"]
    for command in (["validate"], ["run", "-q"]):
        ended = shell(*command, *arguments)
        said = " ".join((ended.out + ended.err).split())
        assert "the run ends before phase 2 of 2 begins" in said
        assert "evaluating 5 rows every 1 steps takes about" in said
    assert shell("run", "-q", *arguments).err == ""  # it is finished


def test_phases_report_what_they_read_and_which_is_never_reached(check: Check, two_buckets: Path) -> None:
    phase = check("--training.max_steps=50")["phase"]["fields"]
    assert phase == {"phase": 2, "tokens": {"web": (100 - 20) * 32}, "there": {"web": 171 * 32}}
    third = "--data.curriculum=[" + "{duration_tokens = 640, mix = {web = 1}}, " * 3 + "]"
    assert "before phase 2 of 3" in check("--training.max_steps=10", third)["phase-never-reached"]["message"]
    assert "before phase 3 of 3" in check("--training.max_steps=20", third)["phase-never-reached"]["message"]


def test_a_bucket_that_does_not_exist_is_an_error(check: Check, two_buckets: Path) -> None:
    config = Path("config.toml")
    config.write_text(config.read_text().replace("mix = {web = 1}", "mix = {webb = 1}"))
    assert "'webb'" in check(code=2)["data-refused"]["message"]


def test_halting_data_that_end_early_are_reported(check: Check, two_buckets: Path) -> None:
    found = check("--training.max_steps=50", "--data.on_exhaustion=halt")
    assert "the data end after step" in found["data-end-early"]["message"]
    assert found["epochs"]["fields"]["epochs"] < 0.2


def test_a_damaged_dataset_is_an_error_of_the_data(check: Check, two_buckets: Path) -> None:
    shard = next(two_buckets.rglob("shard-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert str(shard) in check(code=3)["data-refused"]["message"]
