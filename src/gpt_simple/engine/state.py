"""The counters of a run that a checkpoint keeps beside weights and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import asdict, define


@define(eq=False)
class TrainState:
    """Counts since step 0, over all ranks. ``tokens`` are positions; ``target_tokens`` are those in the loss.

    ``best_val_loss`` is the lowest validation loss so far in nats per target token, None before an evaluation.
    ``finished`` is the reason why the run is complete before ``max_steps``, empty while it is not.
    ``evaluation_due``: a stop left out the evaluation of this step, which a resumed run begins with.
    """

    step: int = 0
    tokens: int = 0
    target_tokens: int = 0
    best_val_loss: float | None = None
    finished: str = ""
    evaluation_due: bool = False

    def advance(self, tokens: int, target_tokens: int) -> None:
        """Count one optimizer step, also one that was skipped."""
        self.step += 1
        self.tokens += tokens
        self.target_tokens += target_tokens

    def record_val_loss(self, loss: float) -> None:
        """Keep the lower of ``loss`` and the best one so far."""
        if self.best_val_loss is None or loss < self.best_val_loss:
            self.best_val_loss = loss

    def finish(self, reason: str) -> None:
        """Mark the run as complete."""
        self.finished = reason

    def keep_evaluation_due(self, due: bool) -> None:
        """Record whether the evaluation of this step is still due."""
        self.evaluation_due = due

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint. ``evaluation_due`` only where it is true, which is seldom."""
        values = asdict(self)
        return values if self.evaluation_due else {key: values[key] for key in values if key != "evaluation_due"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``'s values; other keys are ignored.

        A run that continues is not finished, whatever an earlier launch decided.
        """
        self.step, self.tokens, self.target_tokens = state["step"], state["tokens"], state["target_tokens"]
        self.best_val_loss = state["best_val_loss"]
        self.evaluation_due = state.get("evaluation_due", False)
