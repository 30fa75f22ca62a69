"""The names and layouts of the tensors that the documents of a checkpoint mention. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

ELSEWHERE = ("state", "extra", "groups", "attributes")
"""Optional entries of an optimizer's document: state that belongs to no parameter."""


def optimizer_tensors(document: Mapping[str, Any]) -> set[str]:
    """The names of the tensors that belong to the document of ``state.flatten_optimizer``."""
    saved = document["parameters"]
    names = {f"{key}.{name}" for name, record in saved.items() for key in record["tensors"]}
    packed = [document[kind] for kind in ELSEWHERE if kind in document]
    return names.union(packed_tensors([*packed, *(record.get("nested") for record in saved.values())]))


def as_text(shape: Iterable[int], dtype: str) -> str:
    """The layout of a tensor in documents and messages: ``[32, 8] bfloat16``; float32 is left out."""
    sizes = ", ".join(map(str, shape))
    return f"[{sizes}]" if dtype == "float32" else f"[{sizes}] {dtype}"


def packed_tensors(document: Any) -> Iterator[str]:
    """The names of the tensors in what ``packed.pack`` returned."""
    if isinstance(document, Mapping):
        if "tensor" in document:
            yield document["tensor"]
            return
        for items in document.values():
            yield from packed_tensors(items)
    elif isinstance(document, list):
        for item in document:
            yield from packed_tensors(item)
