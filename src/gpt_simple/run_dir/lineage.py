"""run.json and metrics.jsonl: what ran, from which checkpoints it went on, and the numbers that it wrote."""

from __future__ import annotations

import os
import secrets
import socket
import string
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, define, field

from gpt_simple._documents import COUNT, TIME, check, parse, read
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir, write_json

_ALPHABET = string.ascii_lowercase + string.digits

LAUNCH = {"step": COUNT, "time": TIME, "host": str}
_FACTS = {"config?": dict, "origins?": {...: str}}
_SHAPE = {"run_id": str, "lineage": [LAUNCH], "facts": _FACTS, "val_losses?": {...: (None, float)}, "recorded?": dict}
_ROW = {"kind": str, "step": COUNT, "name?": (None, str), "index?": object, "message?": object}


def new_id() -> str:
    """An id for a run: 8 lower-case letters and digits, which is also what W&B accepts."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(8))


@define
class RunRecord:
    """run.json: an id made once, what ran last, and one entry for each launch."""

    run_dir: RunDir
    run_id: str
    lineage: list[dict[str, Any]] = field(factory=list)
    facts: dict[str, Any] = field(factory=dict)
    val_losses: dict[str, float] = field(factory=dict)
    """Step -> validation loss, of steps that have a checkpoint."""
    recorded: dict[str, Any] = field(factory=dict)
    """What plugins have recorded, as JSON values."""

    @classmethod
    def load(cls, run_dir: RunDir) -> RunRecord:
        """The record of the directory, or a new one if it has none. Nothing is written."""
        path = run_dir.run_json
        try:
            return cls.of(run_dir, read(path))
        except FileNotFoundError:
            return cls(run_dir, new_id())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error})",
                hint="move it away to go on under a new run id; the checkpoints do not depend on it",
            ) from error

    @classmethod
    def of(cls, run_dir: RunDir, document: Any) -> RunRecord:
        """The record for a directory with the content of a run.json. Raises ValueError if it is none."""
        check(document, _SHAPE)
        losses = {step: loss for step, loss in document.get("val_losses", {}).items() if step.isdecimal()}
        recorded = document.get("recorded", {})
        return cls(run_dir, document["run_id"], document["lineage"], document["facts"], losses, recorded)

    def launched(self, facts: Mapping[str, Any], *, step: int, resumed_from: Path | None) -> None:
        """Record what runs now (config, versions, hardware, plugins, data) and from which checkpoint it goes on."""
        self.facts = dict(facts)
        self.lineage.append(
            {
                "step": step,
                "from": None if resumed_from is None else str(resumed_from),
                "time": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
        )
        self.write()

    def evaluated(self, step: int, loss: float, steps_with_checkpoint: Collection[int]) -> None:
        """Keep the validation loss of ``step``, and of other steps only while they have checkpoints. Writes nothing."""
        kept = {key: value for key, value in self.val_losses.items() if int(key) in steps_with_checkpoint}
        self.val_losses = {**kept, str(step): loss}

    def write(self) -> None:
        """Write the record as it is."""
        write_json(self.run_dir.run_json, self.document())

    def document(self) -> dict[str, Any]:
        """The content of run.json."""
        document = asdict(self, recurse=False)
        del document["run_dir"]
        if not self.recorded:
            del document["recorded"]
        return document


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in the order of their steps, the last one of each kind and step.

    A resumed run writes steps again that it had written before it was killed. A step may have several events, which
    differ in ``name`` and in ``index``, or without an index in their message. Lines torn by a kill are left out.
    ``kind`` selects rows of one kind, which is faster if they are few.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    with path.open("rb") as file:
        for line in file:
            if kind is not None and kind.encode() not in line:
                continue
            try:
                row = parse(line)
                check(row, _ROW)
                key = row["kind"], row["step"], row.get("name"), row.get("index", row.get("message"))
                rows.pop(key, None)
            except (ValueError, TypeError):
                continue
            if kind in (None, row["kind"]):
                rows[key] = row
    return sorted(rows.values(), key=lambda row: row["step"])
