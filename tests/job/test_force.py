"""``--force`` discards a run only when the new one is ready: what fails before leaves the old one to go on."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import GptSimpleError, hookimpl
from gpt_simple.run_dir.layout import RunDir
from tests.children import At, Everywhere
from tests.launch.conftest import Ranks, ranks
from tests.launch.conftest import tiny as tiny_of_ranks
from tests.launch.test_failures import reported
from tests.run_dir.test_layout import snapshot
from tests.tiny import TinyRun, state_bytes

__all__ = ["ranks"]


class Plain(torch.nn.Module):
    """A model with nothing that is optional."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(vocab_size, 8), torch.nn.Linear(8, vocab_size)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embedding(input_ids)).float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


def fail(*_: Any, **__: Any) -> Any:
    raise ValueError("boom")


class Parts(Everywhere):
    """Components of which each is wrong in one way."""

    @classmethod
    @hookimpl
    def register_components(cls, registry: Any) -> None:
        registry.add("model", "plain", lambda config, *, vocab_size, max_length: Plain(vocab_size))
        registry.add("model", "fails", fail)
        registry.add("optimizer", "fails", fail)
        registry.add("optimizer", "none", lambda model, config, device: None)
        registry.add("schedule", "fails", fail)
        registry.add("schedule", "nan", lambda config, max_steps: lambda step: float("nan"))


CASES: dict[str, tuple[dict[str, Any], list[Everywhere]]] = {
    "no activation checkpointing": ({"model__name": "plain", "training__gradient_checkpointing": True}, []),
    "no blocks": (
        {
            "model__name": "plain",
            "training__compile": True,
            "training__compile_scope": "blocks",
        },
        [],
    ),
    "small vocabulary": ({"model__vocab_size": 100}, []),
    "model fails": ({"model__name": "fails"}, []),
    "optimizer fails": ({"optimizer__name": "fails"}, []),
    "optimizer is none": ({"optimizer__name": "none"}, []),
    "schedule fails": ({"optimizer__schedule": "fails"}, []),
    "rate is nan": ({"optimizer__schedule": "nan"}, []),
    "unknown weights": ({"plugins__evaluate__weights": ["emma"]}, []),
    "on_model_built fails": ({}, [At("on_model_built", 0, fail)]),
    "stopped by a signal": ({}, [At("on_model_built", 0, lambda run: os.kill(os.getpid(), signal.SIGTERM))]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("validate", [True, False])
def test_what_only_the_build_finds_leaves_the_old_run(tiny: TinyRun, case: str, validate: bool) -> None:
    whole = tiny("whole", optimizer__schedule="constant")  # the others depend on max_steps
    old = tiny(training__max_steps=3, optimizer__schedule="constant")
    options, plugins = CASES[case]
    before = run_files(old.output_dir)
    switch: dict[str, Any] = {} if validate else {"plugins__disable": ["validate"]}
    launch = partial(tiny, force=True, plugins=[Parts(), *plugins], **options, **switch)
    if case == "stopped by a signal":
        assert launch().status == "stopped"
    else:
        with pytest.raises(GptSimpleError):
            launch()
    assert run_files(old.output_dir) == before
    assert state_bytes(tiny(optimizer__schedule="constant")) == state_bytes(whole)


def run_files(root: Path) -> dict[str, object]:
    """All but what says how the last launch ended."""
    return {name: state for name, state in snapshot(root).items() if name not in (".lock", "status.json")}


def test_a_failure_of_one_rank_leaves_the_old_run(ranks: Ranks, tmp_path: Path) -> None:
    root = tmp_path / "run"

    def work(rank: int, fails: bool) -> Any:
        plugins = [At("on_model_built", 0, lambda run: fail() if run.rank == 1 else None)] if fails else []
        return tiny_of_ranks(root, plugins=plugins, force=fails, training__max_steps=3 if fails else 2).status

    assert ranks(2, lambda rank: work(rank, False)) == ["completed"] * 2
    before = run_files(root)
    ((rank, error, text),) = reported(ranks(2, lambda rank: work(rank, True)))
    assert (rank, error, "boom" in text) == (1, "PluginError", True)
    assert run_files(root) == before


def test_a_wrong_name_of_weights_is_reported_once(ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(2, lambda rank: tiny_of_ranks(tmp_path / "run", plugins__evaluate__weights=["liv"]).status)
    ((_, error, text),) = reported(answers)
    assert (error, "no weights of the name 'liv' (did you mean 'live'?)" in text) == ("ConfigError", True)
    assert [answer["code"] for answer in answers] == [2, 2]


def test_a_request_to_stop_outlives_the_discarded_run(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.engine.control._THROTTLE_SECONDS", 0.0)
    old = tiny()
    paths = RunDir(old.output_dir)

    def ask(run: Any) -> None:
        paths.stop_request.write_text('{"by": "node17"}')

    result = tiny(force=True, plugins=[At("on_model_built", 0, ask)])
    assert (result.status, result.reason) == ("stopped", "gpt-simple stop on node17")
