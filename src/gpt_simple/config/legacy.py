"""Keys of the earlier YAML tool: its files load, and each key that is called otherwise here is reported once.

The mapping is made in every source by itself (file, environment, command line), before they are laid over
each other, so that the old and the new spelling of one setting override each other like any two values. A
value that the earlier tool did not know either is left alone, to be reported like any other mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen

_EARLIER = "(of the earlier YAML tool)"
OLD_VALUES: dict[str, tuple[str, str]] = {
    "model.attention_mode": (f"expected causal, sdpa_mask or flex {_EARLIER}, or data.document_mask", ""),
    "data.allow_bucket_exhaustion": (f"expected true or false {_EARLIER}, or data.on_exhaustion", ""),
    "data.allow_budget_mismatch": (f"expected true or false {_EARLIER}", "it has no effect here"),
}
"""Message and hint for an old key whose value is not one of the earlier tool's."""

_GIVEN = "data.document_mask is given, and the attention kernel is chosen by device"


@frozen
class Renamed:
    """An old key that was found, the keys that now say the same, and the sentence that explains it."""

    old: str
    new: tuple[str, ...]
    note: str


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[Renamed]]:
    """The values under today's names, and what was renamed. The input is not changed."""
    model, data = values.get("model"), values.get("data")
    model = dict(model) if isinstance(model, dict) else {}
    data = dict(data) if isinstance(data, dict) else {}
    renamed = [*_attention_mode(model, data), *_exhaustion(data), *_packing(data)]
    if "curriculum" in data and data["curriculum"] is None:
        data["curriculum"] = []
    sections = {"model": model, "data": data}
    return values | {name: section for name, section in sections.items() if section or _is_table(values, name)}, renamed


def _is_table(values: dict[str, Any], name: str) -> bool:
    return isinstance(values.get(name), dict)


def _attention_mode(model: dict[str, Any], data: dict[str, Any]) -> Iterator[Renamed]:
    if (mode := model.get("attention_mode")) in ("causal", "sdpa_mask", "flex"):
        del model["attention_mode"]
        if "document_mask" in data:
            yield Renamed("model.attention_mode", (), f"model.attention_mode {mode} is ignored: {_GIVEN}")
            return
        data["document_mask"] = mask = mode != "causal"
        yield Renamed(
            "model.attention_mode",
            ("data.document_mask",),
            f"model.attention_mode {mode} is read as data.document_mask {_boolean(mask)}; "
            "the attention kernel is chosen by device",
        )


def _exhaustion(data: dict[str, Any]) -> Iterator[Renamed]:
    if isinstance(allowed := data.get("allow_bucket_exhaustion"), bool):
        del data["allow_bucket_exhaustion"]
        old = f"data.allow_bucket_exhaustion {_boolean(allowed)}"
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
        note = f"data.packing {_boolean(packing)} is read as data.packing best_fit"
        if packing:
            yield Renamed("data.packing", ("data.packing",), note)
        else:
            data["document_mask"] = True
            note += " with data.document_mask true: a document still sees only itself"
            yield Renamed("data.packing", ("data.packing", "data.document_mask"), note)


def _boolean(value: bool) -> str:
    return "true" if value else "false"
