"""``run``: what the contract says about where its members may be used is what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import Plugin, PluginError
from gpt_simple.hooks import HOOKS, NoConfig, run
from gpt_simple.hooks.run import CHECKED, ONLY_IN, SINCE, TOGETHER, Run
from gpt_simple.testing import train
from gpt_simple.testing.hook_methods import implement

WITH_RUN = {name: info for name, info in HOOKS.items() if info.arguments[0] == "run"}
"""The hooks that get ``run``, in the order in which a run first calls them."""
ANY_TIME = ("on_log", "on_run_error", "on_close")
"""What these see depends on when they are called."""

USES: dict[str, Callable[[Any], Any]] = {
    **{name: lambda run, name=name: getattr(run, name) for name in vars(Run) if not name.startswith("_")},
    "evaluating": lambda run: run.evaluating(),
    "generate": lambda run: run.generate(max_new_tokens=1),
    "loss": lambda run: run.loss,
    "plugin": lambda run: run.plugin("evaluate", None),
    "facts": lambda run: run.facts(),
    "peak_memory": lambda run: run.peak_memory(),
    "val_batches": lambda run: run.val_batches(1),
    "batches": lambda run: run.batches([0]),
    "record": lambda run: run.record("probe.key", 1),
    "recorded": lambda run: run.recorded("probe.key"),
    "weights": lambda run: run.weights("live"),
    "comm.sum": lambda run: run.comm.sum(torch.ones(())),
    "comm.barrier": lambda run: run.comm.barrier(),
    "control.skip_step": lambda run: run.control.skip_step(torch.zeros((), dtype=torch.bool)),
    "control.save": lambda run: run.control.save("a test asks"),
    "log.info": lambda run: None if run.step else run.log.info("a line"),
    "checkpoints.list": lambda run: run.checkpoints.list(),
    "checkpoints.prune": lambda run: run.checkpoints.prune(keep_last=None),
}
"""How a member is used."""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """For each hook the members that raise PluginError in it, with the message. The run resumes once."""
    found: dict[str, dict[str, str]] = {}

    def probe(name: str, given: Any) -> None:
        for member, use in USES.items():
            if (member, name) == ("log.info", "on_log"):
                continue  # a line for each line would have no end
            try:
                use(given)
            except PluginError as error:
                found.setdefault(name, {})[member] = str(error)
            else:
                found.setdefault(name, {})

    class Probes(Plugin[NoConfig]):
        ranks, on_error = "all", "abort"

    for name, info in WITH_RUN.items():
        setattr(Probes, name, implement(info, lambda self, given, event, name=name: probe(name, given)))
    directory = tmp_path_factory.mktemp("probed")
    train(Probes, output_dir=directory, max_steps=2)
    found.clear()
    train(Probes, output_dir=directory, max_steps=4)
    return found


@pytest.mark.parametrize("hook", [name for name in WITH_RUN if name not in ANY_TIME])
def test_a_member_raises_where_the_contract_says_so(hook: str, refused: dict[str, dict[str, str]]) -> None:
    position = list(WITH_RUN).index
    early = {name for name, first in SINCE.items() if position(hook) < position(first)}
    if hook == "check_runtime":
        early -= set(CHECKED)
    elsewhere = {name for name, only in ONLY_IN.items() if only != hook}
    alone = set() if WITH_RUN[hook].together else set(TOGETHER)
    late = {f"{member}.{name}" for member in early for name in ("list", "prune") if member == "checkpoints"}
    assert refused[hook].keys() == early | elsewhere | alone | late
    for name in early - alone:
        assert refused[hook][name].endswith(f"it is there from {SINCE[name]} on")


@pytest.mark.parametrize("hook", ["on_run_error", "on_close"])
def test_an_end_before_the_model_has_what_there_is(hook: str, tmp_path: Path) -> None:
    """Also of members that come later the error says from where on they are there."""
    seen: list[str] = []

    def look(self: Any, given: Any, event: Any) -> None:
        with pytest.raises(PluginError, match=r"run\.model does not exist yet: it is there from on_model_built on"):
            _ = given.model
        seen.append(str(given.output_dir))

    def fail(self: Any, given: Any, event: Any) -> None:
        raise ValueError("no")

    body = {hook: implement(HOOKS[hook], look), "check_runtime": implement(HOOKS["check_runtime"], fail)}
    with pytest.raises(PluginError, match="ValueError: no"):
        train(type("Looks", (Plugin,), {**body, "on_error": "abort"}), output_dir=tmp_path)
    assert seen == [str(tmp_path)]


def test_the_facts_are_of_members_and_hooks() -> None:
    own = {name for name in vars(Run) if not name.startswith("_")}
    parts = {"control": run.Control, "log": run.Log, "comm": run.Comm, "checkpoints": run.Checkpoints}
    inner = {f"{part}.{name}" for part, cls in parts.items() for name in vars(cls) if not name.startswith("_")}
    assert {*SINCE, *CHECKED} <= own <= {*USES}
    assert {*TOGETHER, *ONLY_IN} <= own | inner
    assert {*SINCE.values(), *ONLY_IN.values()} <= {*HOOKS}
