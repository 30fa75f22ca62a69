"""Which share of the backward pass is left when two processes begin to reduce their gradients: a model of 4 layers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.nullgpu.conftest import Measured

SIZE = {"layers": 4, "length": 512}

# The least share of matrix products that is left, by operations. The head's are the first of a whole model; those
# of a model that runs eager, also in parts, belong to the forward pass.
LEAST_LEFT: dict[str, tuple[dict[str, Any], float]] = {
    "split": ({"splitter": "split"}, 0.35),
    "blocks": ({"scope": "blocks"}, 0.85),
    "eager": ({"compile": False}, 0.85),
}


@pytest.mark.parametrize("name", LEAST_LEFT)
def test_gradients_are_reduced_during_the_backward_pass(name: str, measured: Measured) -> None:
    changes, least = LEAST_LEFT[name]
    answer = measured("reduction", SIZE | changes)
    assert answer["left"] >= least
    assert answer["reductions"] > 1
    assert answer["graph breaks"] == {}


def test_by_default_they_are_reduced_after_it(measured: Measured) -> None:
    """What the first lines of the run say. If torch does better by itself, they are wrong."""
    assert measured("reduction", SIZE)["left"] == 0
