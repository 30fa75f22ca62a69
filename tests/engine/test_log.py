"""A line, a metric or a finding that no logger could write is refused at its caller, and every logger goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpt_simple import Finding, Metric, Plugin, hookimpl, read_metrics
from gpt_simple.hooks.results import COLUMNS
from gpt_simple.testing import Trained, train


class Unreadable:
    def __str__(self) -> str:
        raise ValueError("no text")


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
SPARSE = torch.zeros(()).to_sparse()

LINES: dict[str, Callable[[Any], None]] = {
    "a tuple as key": lambda log: log.info("t", rows={(0, 1): 2}),
    "a mapping as message": lambda log: log.info({"a": 1}),
    "no message": lambda log: log.warning(None),
    "a number as name": lambda log: log.error("t", name=1),
    "a cycle": lambda log: log.info("t", rows=CYCLE),
    "a number of 5,000 digits": lambda log: log.info("t", n=10**5000),
    "an object without text": lambda log: log.info("t", it=Unreadable()),
}

METRICS: dict[str, dict[str, Metric]] = {
    "a number beyond a float": {"a": Metric(10**400)},
    "a weight beyond a float": {"a": Metric(1.0, weight=10**400)},
    "a sparse tensor": {"a": Metric(SPARSE)},
    "a complex tensor": {"a": Metric(torch.tensor(1j))},
}

FINDINGS: dict[str, dict[str, Any]] = {
    "an unknown severity": {"severity": "fatal"},
    "a number as code": {"code": 1},
    "a number as message": {"message": 1},
    "a place that is no text": {"place": ("a", 1)},
    "exit code 0": {"severity": "error", "exit_code": 0},
}


def loggers_of(trained: Trained) -> tuple[list[dict[str, Any]], str]:
    """All rows of metrics.jsonl, and the message about the plugin that was switched off."""
    path = trained.output_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (failure,) = [row for row in rows if row.get("name") == "plugin_failed"]
    assert len(read_metrics(path, "train")) == 2
    assert rows[-1]["name"] == "run_completed"
    assert len({row["kind"] for row in rows}) == 3
    return rows, failure["message"]


@pytest.mark.parametrize("what", LINES)
def test_a_bad_line_fails_its_caller_and_no_logger(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Culprit(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any) -> None:
            LINES[what](run.log)

    trained = train(Culprit, max_steps=2, enable=("console",))
    assert trained.failed == ["culprit"]
    _, message = loggers_of(trained)
    assert message.startswith("plugin culprit (")
    assert " failed in on_step_end at step 1: run.log." in message
    assert "step=2 " in capsys.readouterr().out


@pytest.mark.parametrize("hook", ["collect_metrics", "evaluate"])
@pytest.mark.parametrize("what", METRICS)
def test_a_bad_metric_fails_its_plugin_and_no_logger(what: str, hook: str) -> None:
    culprit = type("Culprit", (Plugin,), {hook: hookimpl(eval(f"lambda self: METRICS[{what!r}]", globals()))})
    trained = train(culprit, max_steps=2)
    assert trained.failed == ["culprit"]
    rows, message = loggers_of(trained)
    assert f" failed in {hook} at step " in message
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]


FIELDS = [column for column in COLUMNS if column not in ("name", "message")]
"""The columns that a field of a log line can have as its name."""


@pytest.mark.parametrize("hook", ["on_step_end", "collect_metrics", "evaluate"])
def test_a_plugin_replaces_no_column_of_a_row(hook: str) -> None:
    def act(self: Any, run: Any) -> Any:
        if hook == "on_step_end":
            return run.log.info("t", name="odd", **dict.fromkeys(FIELDS, -1.0), **{"eval/loss": 0.0})
        return {column: Metric(-1.0) for column in (*COLUMNS, "eval/loss")}

    trained = train(type("Odd", (Plugin,), {hook: hookimpl(act)}), max_steps=2)
    assert trained.failed == []
    names, suffix = (FIELDS, "log") if hook == "on_step_end" else (COLUMNS, "odd")
    rows = read_metrics(trained.output_dir / "metrics.jsonl")
    odd = [row for row in rows if f"kind@{suffix}" in row]
    assert len(odd) == (1 if hook == "evaluate" else 2)
    for row in odd:
        assert [row[f"{name}@{suffix}"] for name in names] == [-1.0] * len(names)
        assert -1.0 not in [row.get(name) for name in COLUMNS]
    assert {row["kind"] for row in rows} == {"train", "eval", "event"}
    (evaluation,) = [row for row in rows if row["kind"] == "eval"]
    assert evaluation["eval/loss"] == trained.result.best_val_loss > 1.0


@pytest.mark.parametrize("what", FINDINGS)
def test_a_bad_finding_fails_its_plugin(what: str) -> None:
    finding = Finding(**{"severity": "warning", "code": "c", "message": "m", **FINDINGS[what]})

    class Culprit(Plugin[Any]):
        @hookimpl
        def check_runtime(self) -> list[Finding]:
            return [finding]

    trained = train(Culprit, max_steps=2)
    assert trained.failed == ["culprit"]
    assert "failed in check_runtime: it returned a list with other things in it" in loggers_of(trained)[1]


def test_text_that_utf8_cannot_hold_is_written_with_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Plugin[Any]):
        @hookimpl
        def on_run_start(self, run: Any) -> None:
            run.log.info("file \udcff.txt", file="\udcff.txt", names=["\udcff"])

    trained = train(Odd, max_steps=2, enable=("console",))
    assert trained.failed == []
    (row,) = [row for row in read_metrics(trained.output_dir / "metrics.jsonl", "event") if "file" in row]
    assert (row["message"], row["file"]) == (r"file \udcff.txt", "\udcff.txt")
    assert r"file \udcff.txt" in capsys.readouterr().out


def test_a_metric_hides_no_field_of_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Named(Plugin[Any]):
        @hookimpl
        def evaluate(self) -> dict[str, Metric]:
            return {"seconds": Metric(-1.0), "eta_seconds": Metric(-1.0)}

    overrides = {"plugins.console.progress": "json"}
    train(Named, max_steps=2, enable=("console",), overrides=overrides)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (row,) = [row for row in rows if row["kind"] == "eval"]
    assert row["seconds"] >= 0
