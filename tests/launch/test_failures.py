"""Mistakes and failures of one process of several: reported once, with its number, and no process waits for ever."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt_simple
from gpt_simple import Plugin, hookimpl
from gpt_simple.cli.main import main
from gpt_simple.hooks import HOOKS
from gpt_simple.testing import misbehaving
from tests.children import Everywhere
from tests.launch.conftest import Ranks, tiny


def reported(answers: list[Any]) -> list[tuple[int, str, str]]:
    """(process, error, text) of every process that would print a message."""
    return [(rank, a["error"], a["text"]) for rank, a in enumerate(answers) if a and "error" in a and not a["silent"]]


def test_a_difference_in_the_configuration_is_named_at_start(ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(3, lambda rank: tiny(tmp_path / "run", training__seed=7 if rank == 1 else 5).status)
    assert [(rank, error) for rank, error, _ in reported(answers)] == [(0, "ConfigError")]
    assert "process 1: training.seed is 7, but 5 in process 0" in answers[0]["text"]
    assert [answer["code"] for answer in answers] == [2, 2, 2]
    assert not (tmp_path / "run").exists()


def test_a_difference_in_the_plugins_is_named_at_start(ranks: Ranks, tmp_path: Path) -> None:
    class Only(Everywhere):
        pass

    answers = ranks(2, lambda rank: tiny(tmp_path / "run", plugins=[Only()] if rank else []).status)
    assert [(rank, error) for rank, error, _ in reported(answers)] == [(0, "ConfigError")]
    assert "process 1: plugins is [" in answers[0]["text"]
    assert "only" in answers[0]["text"]


@pytest.mark.parametrize("mistaken", [{0, 1, 2}, {1}])
def test_a_mistake_before_the_processes_meet_is_reported_once(ranks: Ranks, here: Path, mistaken: set[int]) -> None:
    """Under torchrun itself and srun, where no launcher of ours gathers the messages."""

    def work(rank: int) -> Any:
        options = ["--training.max_steps", "abc"] if rank in mistaken else []
        with redirect_stderr(StringIO()) as shown, pytest.raises(SystemExit) as leaving:
            main(["run", "config.toml", *options])
        return [leaving.value.code, shown.getvalue().splitlines()]

    codes, lines = zip(*ranks(3, work), strict=True)
    assert codes == (2, 2, 2)
    counts = [0 if rank != min(mistaken) else 1 for rank in range(3)]
    assert [len(shown) for shown in lines] == counts, lines
    assert lines[min(mistaken)][0].startswith("error: --training.max_steps: expected an integer")
    assert not (here / "out").exists()


def test_processes_share_the_cores_without_a_warning(ranks: Ranks, tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        del os.environ["OMP_NUM_THREADS"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny(tmp_path / "run", training__max_steps=1)
        return [str(warning.message) for warning in caught if "THREADS" in str(warning.message)]

    assert ranks(2, work) == [[], []]


def test_processes_that_find_other_files_are_reported(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory on a disk of its own machine: the checkpoint is there for one process only."""
    ranks(1, lambda rank: tiny(tmp_path / "0/run", training__max_steps=2).status)

    def work(rank: int) -> Any:
        (tmp_path / str(rank)).mkdir(exist_ok=True)
        os.chdir(tmp_path / str(rank))
        return tiny(Path("run")).status

    answers = ranks(2, work)
    assert [(rank, error) for rank, error, _ in reported(answers)] == [(0, "ConfigError")]
    assert "process 1: checkpoint is None, but 'step-00000002' in process 0" in answers[0]["text"]


def test_a_mistake_that_all_processes_see_is_reported_once(ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(2, lambda rank: tiny(tmp_path / "run", training__compile_scope="model", model__vocab_size=3).status)
    assert [(rank, error) for rank, error, _ in reported(answers)] == [(0, "ConfigError")]
    assert [answer["code"] for answer in answers] == [2, 2]


class Ends(Everywhere):
    """One process ends in its own way at step 3."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.rank, self.how = rank, how

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        if run.rank == self.rank and event.step == 3:
            if self.how == "raises":
                raise ValueError("boom")
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(8)
            os._exit(0)


def test_a_process_that_raises_is_the_one_that_is_reported(ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(3, lambda rank: tiny(tmp_path / "run", plugins=[Ends(1, "raises")]).status)
    ((rank, error, text),) = reported(answers)
    assert (rank, error) == (1, "PluginError")
    assert "on_step_start at step 3: ValueError: boom" in text
    for other in (0, 2):
        assert answers[other]["text"].startswith("process 1 failed: plugin ends")
        assert answers[other]["code"] == 5


def test_a_process_that_dies_is_noticed_at_once_by_all(ranks: Ranks, tmp_path: Path) -> None:
    begin = time.monotonic()
    answers = ranks(4, lambda rank: tiny(tmp_path / "run", plugins=[Ends(3, "dies")]).status)
    assert time.monotonic() - begin < 30
    assert answers[3] is None
    ((_, error, text),) = reported(answers)
    assert error == "RankFailed"
    assert re.match(r"a process died in step 3 \(\w.*(closed|reset).*\); start again with the same command", text)


def test_a_process_that_hangs_is_named_after_the_timeout(ranks: Ranks, tmp_path: Path) -> None:
    options = {"plugins": [Ends(2, "hangs")], "training__peer_timeout_seconds": 3.0}
    answers = ranks(3, lambda rank: tiny(tmp_path / "run", **options).status)
    assert answers[2] is None
    ((rank, error, text),) = reported(answers)
    assert (rank, error) == (0, "RankFailed")
    assert text.startswith("process 2 did not come to the end of step 3: waited 3 s")


def test_a_halt_before_the_first_step_has_one_reason(ranks: Ranks, tmp_path: Path) -> None:
    class Halts(Everywhere):
        @hookimpl
        def check_runtime(self, run: Any) -> list[Any]:
            if run.rank == 1:
                run.control.halt("the weights are wrong")
            return []

    answers = ranks(2, lambda rank: tiny(tmp_path / "run", plugins=[Halts()]).status)
    assert [(answer["code"], answer["text"]) for answer in answers] == [(76, "the weights are wrong")] * 2


def test_a_process_that_hangs_before_a_checkpoint_is_named_too(ranks: Ranks, tmp_path: Path) -> None:
    """The main process may take its time to write one; that all come there is another matter."""

    class Hangs(Everywhere):
        @hookimpl
        def on_checkpoint_saving(self, run: Any, event: Any) -> None:
            if run.rank == 1:
                time.sleep(8)
                os._exit(0)

    options: dict[str, Any] = {"plugins": [Hangs()], "training__peer_timeout_seconds": 3.0, "training__save_steps": 2}
    answers = ranks(2, lambda rank: tiny(tmp_path / "run", **options).status)
    assert answers[1] is None
    ((rank, error, text),) = reported(answers)
    assert (rank, error) == (0, "RankFailed")
    assert text.startswith("process 1 did not come to the end of step 3: waited 3 s")


def test_the_process_whose_loss_is_no_number_is_named(ranks: Ranks, tmp_path: Path) -> None:
    class Spoils(Everywhere):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            if run.rank == 1:
                run.model.register_forward_hook(lambda module, given, answer: answer * float("nan"))

    def work(rank: int) -> Any:
        options = {"training__max_skipped_steps": 2, "training__logging_steps": 1}
        return tiny(tmp_path / "run", plugins=[Spoils()], **options).reason

    answers = ranks(2, work)
    assert answers[0].endswith("; the loss was not finite in process 1")
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert "were skipped; the loss was not finite in process 1" in text


class OneGradient(Everywhere):
    """One process spoils its gradient, or requests to skip the step."""

    def __init__(self, rank: int, by_flag: bool) -> None:
        super().__init__()
        self.rank, self.by_flag = rank, by_flag
        self.ends: list[tuple[bool, list[str]]] = []

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.ends.append((bool(event.skipped), [name for name, flag in event.skipped_by.items() if flag]))

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        if run.rank == self.rank and event.step == 2 and not self.by_flag:
            handle: Any = None

            def spoil(gradient: torch.Tensor) -> torch.Tensor:
                handle.remove()
                return gradient * float("nan")

            handle = next(run.model.parameters()).register_hook(spoil)

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        if run.rank == self.rank and event.step == 2 and self.by_flag:
            run.control.skip_step(torch.tensor(True))


@pytest.mark.parametrize("by_flag", [False, True])
def test_a_step_that_one_process_skips_is_skipped_by_all(ranks: Ranks, tmp_path: Path, by_flag: bool) -> None:
    def work(rank: int) -> Any:
        plugin = OneGradient(1, by_flag)
        return tiny(tmp_path / "run", plugins=[plugin]).final_loss, plugin.ends

    answers = ranks(2, work)
    assert answers[0][0] == answers[1][0]
    for _, ends in answers:
        assert ends == [[step == 2, ["onegradient"] if by_flag and step == 2 else []] for step in range(1, 7)]
    text = (tmp_path / "run/metrics.jsonl").read_text()
    why = (
        "were skipped because the plugin onegradient asked for it"
        if by_flag
        else "had a non-finite gradient and were skipped"
    )
    assert f"1 of the last 2 steps {why}" in text
    assert text.count("1 of the last 2 steps") == 1


class FailsOnOne(Plugin[Any]):
    ranks = "all"
    on_error = "disable"

    def __init__(self) -> None:
        super().__init__(None)
        self.steps: list[int] = []

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.steps.append(event.step)
        if run.rank == 1 and event.step == 2:
            raise ValueError("boom")


def test_a_plugin_that_fails_on_one_process_is_disabled_on_all(ranks: Ranks, tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        plugin = FailsOnOne()
        tiny(tmp_path / "run", plugins=[plugin])
        return plugin.steps

    assert ranks(2, work) == [[1, 2], [1, 2]]


def collective_in(hook: str, what: str) -> Plugin[Any]:
    """A plugin that uses a collective in one hook, on the main process only where the hook allows that."""

    def implementation(self: Any, run: Any, event: Any) -> Any:
        if what == "comm":
            run.comm.barrier()
        else:
            next(run.val_batches(1))
        return {} if HOOKS[hook].returns == "metrics" else None

    body = {"__init__": lambda self: Plugin.__init__(self, None), "on_error": "abort", hook: hookimpl(implementation)}
    plugin: Plugin[Any] = type("Collective", (Plugin,), body)()
    return plugin


CLOSED = [name for name, info in HOOKS.items() if info.event is not None and info.ranks != "all"]


@pytest.mark.parametrize("what", ["comm", "val_batches"])
def test_a_collective_raises_in_hooks_that_not_all_processes_run(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one process too, so that the author learns of it."""
    for hook in CLOSED:
        directory = tmp_path / hook
        plugins: list[Any] = [collective_in(hook, what)]
        if hook == "on_checkpoint_loaded":
            tiny(directory, training__max_steps=1)
        if hook == "on_run_error":
            plugins.append(misbehaving("on_step_end", "raises", on_error="abort"))
        text = ""
        try:
            tiny(directory, plugins=plugins, training__max_steps=2, training__eval_steps=1)
        except gpt_simple.GptSimpleError as error:
            text = str(error)
        assert "in a hook that not every process runs at once" in text + capsys.readouterr().err, hook


def test_a_collective_works_in_hooks_that_all_processes_run(ranks: Ranks, tmp_path: Path) -> None:
    hooks = [name for name, info in HOOKS.items() if info.event is not None and info.ranks == "all"]
    plugins = [collective_in(hook, "comm") for hook in hooks]
    for number, plugin in enumerate(plugins):
        type(plugin).__name__ = f"Collective{number}"
    assert ranks(2, lambda rank: tiny(tmp_path, plugins=plugins, training__eval_steps=2).status) == ["completed"] * 2


@pytest.mark.parametrize(
    ("error", "text"), [(torch.OutOfMemoryError, "is out of memory"), (torch.AcceleratorError, "is lost")]
)
def test_a_failure_of_one_device_is_reported_once(
    error: type[Exception], text: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process waits in the reduction of the gradients or in the decision."""

    def work(rank: int) -> Any:
        step, calls = torch.optim.AdamW.step, []

        def fake(*arguments: Any, **named: Any) -> Any:
            calls.append(rank)
            if rank == 1 and len(calls) == 2:
                raise error("CUDA error: it has failed")
            return step(*arguments, **named)

        monkeypatch.setattr(torch.optim.AdamW, "step", fake)
        return tiny(tmp_path / "run", training__max_steps=4, training__save_steps=1).status

    answers = ranks(2, work)
    assert [(rank, code["code"]) for rank, code in enumerate(answers)] == [(0, 1), (1, 1)]
    [(rank, _, message)] = reported(answers)
    assert (rank, text in message) == (1, True)
    assert "plugin" not in message
    assert ranks(2, lambda rank: tiny(tmp_path / "run", training__max_steps=4).steps) == [4, 4]
