"""The result of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from gpt_simple.errors import ExitCode

_EXIT = {"completed": ExitCode.COMPLETED, "stopped": ExitCode.STOPPED, "halted": ExitCode.HALTED}


@frozen
class TrainResult:
    """The outcome of a run. Losses are in nats per target token."""

    status: str
    """``completed``, ``stopped`` (resumable) or ``halted`` (needs a person)."""

    reason: str
    """Why it ended, in words."""

    steps: int
    """Optimizer steps since step 0, those of earlier launches included."""

    total_tokens: int
    """Positions consumed: the samples of all steps and processes x max_length."""

    total_target_tokens: int
    """The positions of these that were in the loss."""

    final_loss: float | None
    """Mean training loss of the last logging interval."""

    final_val_loss: float | None
    best_val_loss: float | None
    bits_per_byte: float | None

    floor: float | None
    """The lowest validation loss that is possible, if the process that generates the data is known."""

    checkpoint_path: Path | None
    output_dir: Path
    seconds: float
    """Wall time of this process."""

    tokens_per_second: float | None
    """Median over the logging intervals of this process, without evaluation, checkpoints and compilation."""

    peak_memory_gib: float
    summary: Mapping[str, Any] = field(factory=dict, repr=False)
    """The content of ``summary.json``."""

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of ``gpt-simple run``."""
        return _EXIT[self.status]
