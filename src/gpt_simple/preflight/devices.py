"""Cards that a run can be planned for without having them: their memory, precision and peak arithmetic."""

from __future__ import annotations

import difflib
import re

from attrs import frozen

from gpt_simple.errors import ConfigError

_GIB = 2**30
_RESERVE = 1.5 * _GIB
"""What is no tensor: the CUDA context, cuBLAS workspaces, NCCL, and holes between blocks."""

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@frozen
class Card:
    """A device: the bytes that torch sees, the precision that ``auto`` means on it, and FLOP/s in that precision."""

    name: str
    memory: int
    precision: str
    flops: float | None = None

    @property
    def usable(self) -> int:
        """Bytes for tensors, once the runtime has taken its share."""
        return max(0, int(self.memory - _RESERVE))


def _card(name: str, gib: float, precision: str, teraflops: float) -> tuple[str, Card]:
    return name, Card(name, int(gib * _GIB), precision, teraflops * 1e12)


# Memory as torch reports it, rounded down; dense arithmetic from the vendors' data sheets.
CARDS = dict(
    (
        _card("h200", 139.5, "bf16", 989),
        _card("h100", 79.0, "bf16", 989),
        _card("h100-pcie", 79.0, "bf16", 756),
        _card("a100", 79.0, "bf16", 312),
        _card("a100-40", 39.3, "bf16", 312),
        _card("l40s", 44.3, "bf16", 362),
        _card("l4", 22.0, "bf16", 121),
        _card("a10g", 22.0, "bf16", 70),
        _card("rtx4090", 23.5, "bf16", 165.2),
        _card("rtx3090", 23.5, "bf16", 71),
        _card("v100", 31.7, "fp16", 125),
        _card("v100-16", 15.7, "fp16", 125),
        _card("t4", 14.5, "fp16", 65),
    )
)


def find_card(text: str) -> Card:
    """The card of a name, or one with so many bytes (``24GiB``); ConfigError says which names there are."""
    if (card := CARDS.get(text.lower().replace(" ", "").replace("_", "-"))) is not None:
        return card
    found = re.fullmatch(r"([\d_.]+)\s*([kmg]i?b)?", text.strip(), re.IGNORECASE)
    if found is not None:
        size = float(found[1].replace("_", "")) * _UNITS[(found[2] or "").lower()]
        return Card(text, int(size), "bf16")
    close = difflib.get_close_matches(text.lower(), CARDS, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(
        f"unknown{meant}",
        location=f"--device {text}",
        hint=f"expected one of {', '.join(CARDS)}, or bytes such as 24GiB",
    )
