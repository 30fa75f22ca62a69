"""Metrics of all ranks as floats, in one collective and one read of the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from attrs import define, field

from gpt_simple.distributed.process_group import ProcessGroup, digest
from gpt_simple.hooks.results import Metric

Layout = tuple[tuple[str, str], ...]
"""Names of metrics and how each is reduced."""

_FIRST_CAPACITY = 128

_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch before 2.13 has only the former name."""


@define(eq=False)
class MetricReducer:
    """Reduces metrics over the ranks of ``group``, which all call it together."""

    group: ProcessGroup
    _capacity: int = field(default=_FIRST_CAPACITY, init=False)
    """Numbers of one rank that a collective carries; the same on all ranks."""
    _layouts: dict[int, Layout] = field(factory=dict, init=False)
    """The layouts of all ranks, by their digests; the same on all ranks."""

    def reduce(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """One float for each name.

        A metric that only some ranks have is reduced over those, in the way that the lowest of them asks for.
        """
        names = sorted(metrics)
        layout = tuple((name, str(metrics[name].reduce)) for name in names)
        # Values and weights in turn.
        parts = [part for name in names for part in (metrics[name].value, metrics[name].weight)]
        on_device = [index for index, part in enumerate(parts) if isinstance(part, torch.Tensor)]
        on_host = [0.0 if isinstance(part, torch.Tensor) else float(part) for part in parts]
        numbers = torch.tensor(on_host, dtype=torch.float64).to(self.group.device, non_blocking=True)
        if on_device:
            tensors = [parts[index].detach().to(numbers) for index in on_device]  # type: ignore[union-attr]
            numbers[on_device] = torch.stack(tensors)
        rows = [(layout, numbers.tolist())] if self.group.size == 1 else self._all_gather(layout, numbers)
        ways: dict[str, str] = {}
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in metrics}
        for row_layout, row in rows:
            for index, (name, way) in enumerate(row_layout):
                ways.setdefault(name, way)
                pairs.setdefault(name, []).append((row[2 * index], row[2 * index + 1]))
        return {name: _combine(ways[name], values) for name, values in pairs.items()}

    def _all_gather(self, layout: Layout, numbers: torch.Tensor) -> list[tuple[Layout, list[float]]]:
        """Every rank's layout and numbers, in the order of ranks.

        One collective, of the same size on all ranks. Only when ranks have different metrics, and for the first time, a
        second one exchanges their names.
        """
        mine = int(digest(layout)[:12], 16)  # exact as a float64
        while True:
            head = torch.tensor([mine, len(numbers)], dtype=torch.float64).to(self.group.device, non_blocking=True)
            padding = numbers.new_zeros(max(0, self._capacity - len(numbers)))
            packed = torch.cat([head, numbers[: self._capacity], padding])
            gathered = packed.new_empty(self.group.size * len(packed))
            _all_gather_single(gathered, packed)
            rows = gathered.view(self.group.size, -1).tolist()
            needed = int(max(row[1] for row in rows))
            if needed <= self._capacity:
                break
            self._capacity = needed
        digests = {int(row[0]) for row in rows}
        # The same decision on all ranks: the digests and the known layouts are those of all of them.
        if len(digests) > 1 and not digests <= self._layouts.keys():
            self._layouts |= dict(self.group.gather((mine, layout), patient=False))
        layouts = {mine: layout, **self._layouts}
        return [(layouts[int(row[0])], row[2:]) for row in rows]


def _combine(how: str, pairs: list[tuple[float, float]]) -> float:
    values = [value for value, _ in pairs]
    if how == "mean":
        total = sum(weight for _, weight in pairs)
        counted = [value * weight for value, weight in pairs if weight != 0]
        return sum(counted) / total if total else float("nan")
    if how == "last":
        return values[0]
    if how == "sum":
        return sum(values)
    return max(values) if how == "max" else min(values)
