"""Cards train every width of heads, and flex attention is chosen where it fits the card."""

from __future__ import annotations

import pytest

from tests.nullgpu.conftest import Measured
from tests.nullgpu.device import CARDS

# Any even width is accepted: narrower and wider than flex attention takes, powers of two and others.
HEADS = [2, 8, 16, 22, 40, 64, 80, 100, 128, 160, 192, 256]


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_a_card_trains_every_width_of_heads(card: str, measured: Measured) -> None:
    errors = measured("heads", {"heads": HEADS, "compiled": [64]}, CARDS[card])
    assert len(errors) == 2 * len(HEADS) + 2
    assert errors == dict.fromkeys(errors, "")


@pytest.mark.parametrize("card", CARDS)
def test_flex_fits_the_cards_that_it_is_chosen_for(card: str, measured: Measured) -> None:
    answer = measured("flex", {"heads": [16, 64, 128], "force": False}, CARDS[card])
    assert {head: each["error"] for head, each in answer.items()} == dict.fromkeys(answer, "")
    chosen = {head for head, each in answer.items() if each["kernel"] == "flex"}
    assert chosen == (set() if CARDS[card].capability < 80 else {"16", "64", "128"})


def test_wider_heads_do_not_fit_into_less_shared_memory(measured: Measured) -> None:
    """The reason for the widest head that flex attention is chosen for."""
    answer = measured("flex", {"heads": [192], "force": True}, CARDS["rtx4090"])
    assert answer["192"]["kernel"] == "dense mask"
    assert "out of resource" in answer["192"]["error"]
