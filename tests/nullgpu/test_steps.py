"""A steady step of two layers, 768 wide, on two micro-batches of 4 x 1,024 tokens: launches, graphs, waits, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.nullgpu.conftest import Measured
from tests.nullgpu.events import launches

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpointing": {"checkpointing": False},
    "document mask": {"documents": True},
    "narrow residual stream": {"residual_in_fp32": False},
    "blocks": {"scope": "blocks"},
    "eager": {"compile": False},
    "eager, no checkpointing": {"compile": False, "checkpointing": False},
    "eager, document mask": {"compile": False, "documents": True},
}

# Casts of weights, forward and backward of the first micro-batch, those of a later one, clipping, the optimizer.
PHASES = ("start", "forward 1", "backward 1", "forward 2", "backward 2", "clip", "optimizer")
MOST_LAUNCHES = {
    "default": (1, 32, 94, 32, 115, 10, 6),
    "no checkpointing": (1, 32, 73, 32, 94, 10, 6),
    "document mask": (1, 38, 99, 38, 120, 10, 6),
    "eager, document mask": (1, 124, 232, 124, 253, 10, 6),
    "narrow residual stream": (1, 32, 94, 32, 115, 10, 6),
    "eager": (1, 97, 228, 97, 249, 10, 6),
    "eager, no checkpointing": (1, 97, 160, 97, 181, 10, 6),
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


@pytest.mark.parametrize("name", [name for name, changes in VARIANTS.items() if changes.get("documents")])
def test_a_document_mask_sorts_and_copies_nothing(name: str, measured: Measured) -> None:
    answer = measured("steps", VARIANTS[name])
    assert answer["sorts"]["forward 2"] == 0
    assert answer["phases"]["forward 2"].get("copy D>D", 0) == 0


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_one_graph_in_training_one_in_evaluation(name: str, measured: Measured) -> None:
    answer = measured("steps", VARIANTS[name])
    assert (answer["graph breaks"], answer["warnings"]) == ({}, [])
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


def test_a_narrow_residual_stream_is_nowhere_wide_in_the_forward(measured: Measured) -> None:
    assert measured("steps", VARIANTS["narrow residual stream"])["wide buffers"] == 0
    assert measured("steps", VARIANTS["default"])["wide buffers"] > 0, "this test could not fail"


@pytest.mark.parametrize(("wide", "narrow"), [("default", "narrow residual stream")])
def test_a_narrow_residual_stream_needs_less_memory(wide: str, narrow: str, measured: Measured) -> None:
    peaks = {name: measured("steps", VARIANTS[name])["peak"] for name in (wide, narrow)}
    predicted = {name: measured("steps", VARIANTS[name])["predicted"] for name in (wide, narrow)}
    assert peaks[narrow] <= peaks[wide]
    assert predicted[narrow] <= predicted[wide]


def test_keys_of_grouped_heads_are_not_copied_for_a_dense_mask(measured: Measured) -> None:
    grouped = {"compile": False, "checkpointing": False, "documents": True, "precision": "no", "n_kv_head": 4}
    phases = measured("steps", grouped)["phases"]
    most = 92 if torch.__version__ >= "2.14" else 96
    assert launches(phases["forward 1"]) <= most


def test_a_budget_is_between_everything_and_nothing(measured: Measured) -> None:
    """Of activations, without the logits of a large vocabulary."""
    small = {"layers": 4, "rows": 4, "length": 512, "vocab_size": 2048}
    nothing = measured("steps", {**small, "checkpointing": False})
    half = measured("steps", {**small, "checkpointing": False, "budget": 0.5})
    everything = measured("steps", small)
    assert everything["peak"] < half["peak"] < nothing["peak"] <= nothing["predicted"] + nothing["workspaces"]
    assert half["predicted"] == nothing["predicted"], "the prediction is an upper bound of any budget"
