"""Validation loss over the whole val split, weighted by tokens.

Every ``training.eval_steps`` steps and at the end. ``eval/loss`` is in nats per target token; ``eval/bits_per_byte`` is
the same nats over the bytes of the text (nats / (ln 2 x bytes)), so that tokenizers compare. The end-of-document
tokens count in the nats and have no bytes: it is the length of the whole split when the model compresses it. The metric
is left out where the bytes are not known exactly.

``weights`` names what is evaluated: the model's own weights, sets that plugins keep, or both. ``eval/loss`` is of the
first, a further set ``ema`` is ``eval/ema/loss``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from attrs import frozen
from typing_extensions import Doc

from gpt_simple.hooks import Finding, Metric, Plugin, hookimpl

if TYPE_CHECKING:
    import torch

    from gpt_simple import Config as RunConfig
    from gpt_simple.hooks import Preflight, Run
    from gpt_simple.hooks import events as ev


@frozen
class EvaluateConfig:
    """``[plugins.evaluate]``."""

    weights: Annotated[
        tuple[str, ...],
        Doc(
            "weights to evaluate: live are the model's own, others those of a plugin; eval/loss and the best checkpoint"
            " are of the first"
        ),
    ] = ("live",)


class Evaluate(Plugin[EvaluateConfig]):
    """Runs on every process, each on its share of the rows."""

    Config = EvaluateConfig
    ranks = "all"
    on_error = "abort"

    _token_bytes: torch.Tensor | None = None
    """The bytes of each token, where they add up to those of the text."""
    _bytes: int | None = None
    """The bytes of all that an evaluation reads, for any other tokenizer."""

    def used_weights(self) -> dict[str, tuple[str, ...]]:
        return {"weights": self.config.weights}

    @hookimpl
    def check_config(self, config: RunConfig, preflight: Preflight) -> list[Finding]:
        names = self.config.weights
        if names and len({*names}) == len(names):
            return []
        given = ", ".join(names) or "none"
        message = f"expected one or more names of weights, each once; found {given}"
        return [Finding("error", "weights", message, place="plugins.evaluate.weights")]

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        import torch

        val, training = run.facts()["data"]["val"], run.config.training
        batches = training.max_eval_batches
        whole = batches is None or batches * training.per_device_batch_size >= val["rows"]
        exact = getattr(run.tokenizer, "token_bytes_are_exact", None)  # a plugin's tokenizer may say nothing
        if whole and val["bytes"] and not exact:
            self._bytes = val["bytes"]
        elif exact is not False:
            self._token_bytes = torch.as_tensor(run.tokenizer.token_bytes(), dtype=torch.int64).to(run.device)

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        every = run.config.training.eval_steps
        if every and (event.is_last or event.step % every == 0):
            run.control.evaluate(f"every {every} steps")

    @hookimpl
    def evaluate(self, run: Run, event: ev.Evaluate) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {}
        for index, name in enumerate(self.config.weights):
            with run.weights(name):
                metrics |= self._metrics(run, f"eval/{name}" if index else "eval")
        return metrics

    def _metrics(self, run: Run, prefix: str) -> dict[str, Metric]:
        import torch

        nats = torch.zeros((), dtype=torch.float64, device=run.device)
        size = torch.zeros((), dtype=torch.int64, device=run.device)
        targets = 0
        for batch in run.val_batches(run.config.training.max_eval_batches):
            nats += run.loss(batch)
            if self._token_bytes is not None:
                size += self._token_bytes[batch.labels.clamp(min=0)].masked_fill(batch.labels < 0, 0).sum()
            targets += batch.targets
        bits = nats / math.log(2)
        metrics = {f"{prefix}/loss": Metric(nats / max(1, targets), weight=targets)}
        if self._token_bytes is not None:
            metrics[f"{prefix}/bits_per_byte"] = Metric(bits / size.clamp(min=1), weight=size)
        elif self._bytes is not None:
            metrics[f"{prefix}/bits_per_byte"] = Metric(bits / self._bytes, reduce="sum")
        return metrics

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
