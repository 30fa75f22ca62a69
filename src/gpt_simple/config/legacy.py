"""Keys of the earlier YAML tool. Its files load, and each key with another name here is reported once.

Each source (file, environment, command line) is translated by itself before the sources are merged, so that the old and
the new spelling of a setting override each other like any two values. A value that the earlier tool did not accept
either is left unchanged, to be reported like any other mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from gpt_simple.config.mistakes import show

_EARLIER = "(of the earlier YAML tool)"
OLD_VALUES: dict[str, tuple[str, str]] = {
    "model.attention_mode": (f"expected causal, sdpa_mask or flex {_EARLIER}, or data.document_mask", ""),
    "data.allow_bucket_exhaustion": (f"expected true or false {_EARLIER}, or data.on_exhaustion", ""),
    "data.allow_budget_mismatch": (f"expected true or false {_EARLIER}", "it has no effect here"),
}
"""Message and hint for an old key with a value that the earlier tool did not accept."""


class Renamed(NamedTuple):
    """An old key that was found, the keys that replace it, and a note for the user."""

    old: str
    new: tuple[str, ...]
    note: str


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[Renamed]]:
    """The values under today's names, and what was renamed. The input is not changed."""
    model, data = (dict(values[name]) if isinstance(values.get(name), dict) else {} for name in ("model", "data"))
    renamed = [*_attention_mode(model, data), *_exhaustion(data), *_packing(data)]
    if "curriculum" in data and data["curriculum"] is None:
        data["curriculum"] = []
    sections = {"model": model, "data": data}
    tables = {name: table for name, table in sections.items() if table or isinstance(values.get(name), dict)}
    return values | tables, renamed


def _attention_mode(model: dict[str, Any], data: dict[str, Any]) -> Iterator[Renamed]:
    if (mode := model.get("attention_mode")) in ("causal", "sdpa_mask", "flex"):
        old, why = "model.attention_mode", "the attention kernel is chosen by device"
        del model["attention_mode"]
        if "document_mask" in data:
            yield Renamed(old, (), f"{old} {mode} is ignored: data.document_mask is given, and {why}")
        else:
            data["document_mask"] = mask = mode != "causal"
            yield Renamed(
                old, ("data.document_mask",), f"{old} {mode} is read as data.document_mask {show(mask)}; {why}"
            )


def _exhaustion(data: dict[str, Any]) -> Iterator[Renamed]:
    if isinstance(allowed := data.get("allow_bucket_exhaustion"), bool):
        del data["allow_bucket_exhaustion"]
        old = f"data.allow_bucket_exhaustion {show(allowed)}"
        if "on_exhaustion" in data:
            yield Renamed("data.allow_bucket_exhaustion", (), f"{old} is ignored: data.on_exhaustion is given")
        else:
            data["on_exhaustion"] = policy = "renormalise" if allowed else "halt"
            note = f"{old} is read as data.on_exhaustion {policy}"
            yield Renamed("data.allow_bucket_exhaustion", ("data.on_exhaustion",), note)
    if isinstance(allowed := data.get("allow_budget_mismatch"), bool):
        del data["allow_budget_mismatch"]
        yield Renamed(
            "data.allow_budget_mismatch",
            (),
            "data.allow_budget_mismatch is ignored: a curriculum may be shorter or longer than the run",
        )


def _packing(data: dict[str, Any]) -> Iterator[Renamed]:
    if isinstance(packing := data.get("packing"), bool):
        data["packing"] = "best_fit"
        note = f"data.packing {show(packing)} is read as data.packing best_fit"
        if packing:
            yield Renamed("data.packing", ("data.packing",), note)
        else:
            data["document_mask"] = True
            note += " with data.document_mask true: a document still sees only itself"
            yield Renamed("data.packing", ("data.packing", "data.document_mask"), note)
