"""A steady step of two layers, 768 wide, on two micro-batches of 4 x 1,024 tokens: launches, graphs, waits, memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.nullgpu.conftest import Measured
from tests.nullgpu.events import launches

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpointing": {"checkpointing": False},
    "document mask": {"documents": True},
    "blocks": {"scope": "blocks"},
    "eager": {"compile": False},
    "eager, no checkpointing": {"compile": False, "checkpointing": False},
    "eager, document mask": {"compile": False, "documents": True},
}

# The forward and backward of the first micro-batch, those of a later one, clipping, the optimizer.
PHASES = ("forward 1", "backward 1", "forward 2", "backward 2", "clip", "optimizer")
MOST_LAUNCHES = {
    "default": (46, 108, 46, 129, 10, 6),
    "no checkpointing": (46, 73, 46, 94, 10, 6),
    "document mask": (62, 113, 62, 134, 10, 6),
    "eager": (111, 242, 111, 263, 10, 6),
    "eager, no checkpointing": (111, 160, 111, 181, 10, 6),
}

GRAPHS = [name for name, changes in VARIANTS.items() if changes.get("compile", True)]
WHOLE = [name for name in GRAPHS if VARIANTS[name].get("scope") != "blocks"]
EAGER = [name for name in VARIANTS if name not in GRAPHS]


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_a_step_launches_no_more_kernels_than_before(name: str, measured: Measured) -> None:
    phases = measured("steps", VARIANTS[name])["phases"]
    now = dict(zip(PHASES, (launches(phases[phase]) for phase in PHASES), strict=True))
    most = dict(zip(PHASES, MOST_LAUNCHES[name], strict=True))
    assert {phase: (now[phase], most[phase]) for phase in PHASES if now[phase] > most[phase]} == {}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_one_graph_in_training_one_in_evaluation(name: str, measured: Measured) -> None:
    answer = measured("steps", VARIANTS[name])
    assert answer["graph breaks"] == {}
    assert answer["frames"] == {"training": 1, "evaluation": 1, "later": 0}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_steady_step_neither_waits_nor_asks_for_memory(name: str, measured: Measured) -> None:
    answer = measured("steps", VARIANTS[name])
    assert (answer["waits"], answer["allocations"]) == ([], [])


@pytest.mark.parametrize("name", EAGER)
def test_an_eager_peak_is_predicted_within_2_percent(name: str, measured: Measured) -> None:
    """The workspaces of cuBLAS, which torch's allocator counts, are no part of the prediction."""
    answer = measured("steps", VARIANTS[name])
    assert answer["predicted"] == pytest.approx(answer["peak"] - answer["workspaces"], rel=0.02)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_compiled_peak_is_at_most_15_percent_below(name: str, measured: Measured) -> None:
    answer = measured("steps", VARIANTS[name])
    peak = answer["peak"] - answer["workspaces"]
    assert peak <= answer["predicted"] <= 1.15 * peak
