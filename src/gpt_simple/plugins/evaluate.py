"""Validation loss over the whole val split, weighted by tokens.

Every ``training.eval_steps`` steps and at the end. ``eval/loss`` is in nats per target token; ``eval/bits_per_byte`` is
the same nats over the bytes of the text (nats / (ln 2 x bytes)), so that tokenizers compare. The end-of-document
tokens count in the nats and have no bytes: it is the length of the whole split when the model compresses it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gpt_simple.hooks import Metric, NoConfig, Plugin, hookimpl

if TYPE_CHECKING:
    import torch

    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev


class Evaluate(Plugin[NoConfig]):
    """Runs on every process, each on its share of the rows."""

    ranks = "all"
    on_error = "abort"

    _token_bytes: torch.Tensor

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        import torch

        self._token_bytes = torch.as_tensor(run.tokenizer.token_bytes(), dtype=torch.int64).to(run.device)

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        every = run.config.training.eval_steps
        if every and (event.is_last or event.step % every == 0):
            run.control.evaluate(f"every {every} steps")

    @hookimpl
    def evaluate(self, run: Run, event: ev.Evaluate) -> dict[str, Metric]:
        import torch

        nats = torch.zeros((), dtype=torch.float64, device=run.device)
        size = torch.zeros((), dtype=torch.int64, device=run.device)
        targets = 0
        for batch in run.val_batches(run.config.training.max_eval_batches):
            nats += run.loss(batch)
            size += self._token_bytes[batch.labels.clamp(min=0)].masked_fill(batch.labels < 0, 0).sum()
            targets += batch.targets
        bits = nats / math.log(2)
        return {
            "eval/loss": Metric(nats / max(1, targets), weight=targets),
            "eval/bits_per_byte": Metric(bits / size.clamp(min=1), weight=size),
        }

    @hookimpl
    def on_eval_end(self, run: Run, event: ev.EvalEnd) -> None:
        loss, floor = event.metrics["eval/loss"], run.facts()["floor"]
        # A capped evaluation sees part of the split, whose own floor may lie a little lower.
        whole = run.config.training.max_eval_batches is None
        if whole and floor is not None and loss < floor:
            run.log.error(
                f"the validation loss {loss:.4f} is below the floor {floor:.4f}, which no honest model can reach:"
                " look for attention to later tokens, for validation data in training, or for a wrong loss",
                name="below_floor",
                loss=loss,
                floor=floor,
            )
