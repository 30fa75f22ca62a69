"""A plugin of a user of version 0.1.0: weights, state, metrics, files and a component of its own."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple import Finding, Metric, Plugin, Run, hookimpl
from gpt_simple.hooks import (
    BatchReady,
    CheckpointLoaded,
    CheckpointSaved,
    Close,
    CollectMetrics,
    EvalEnd,
    Evaluate,
    GradientsReady,
    MetricsReady,
    Registry,
    RunEnd,
    RunStart,
    StepEnd,
)


@frozen
class RowsConfig:
    boost: Annotated[float, Gt(0), Doc("what gradients are multiplied with, divided by the number of steps")] = 2.0
    digits: Annotated[int, Ge(0), Doc("digits of the loss in rows.jsonl")] = 4


def zigzag(config: Any, max_steps: int) -> Any:
    return lambda step: config.learning_rate * (1.0 if step % 2 else 0.5)


class Rows(Plugin[RowsConfig]):
    """Remembers every row that it sees, and changes gradients depending on what it remembers."""

    Config = RowsConfig
    ranks = "all"
    state_version = 3

    def __init__(self, config: RowsConfig) -> None:
        super().__init__(config)
        self.steps, self.digest, self.total = 0, "", torch.zeros((), dtype=torch.float64)
        self.unread: list[torch.Tensor] = []
        self.file: Any = None

    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("schedule", "zigzag", zigzag)

    @hookimpl
    def check_config(self, config: Any) -> list[Finding]:
        short = config.training.max_steps < 100
        return [Finding("warning", "short", "a short run", place="training.max_steps")] if short else []

    @hookimpl
    def check_runtime(self, run: Run) -> list[Finding]:
        return [] if run.world_size == 1 else [Finding("error", "alone", "one process, please")]

    @hookimpl
    def on_run_start(self, run: Run, event: RunStart) -> None:
        self.file = (run.output_dir / "rows.jsonl").open("a")
        self._write(event="start", step=event.step, tokens=event.tokens, resumed=event.resumed_from is not None)

    @hookimpl
    def on_checkpoint_loaded(self, run: Run, event: CheckpointLoaded) -> None:
        run.log.info(f"rows goes on after {self.steps} steps", name="rows", steps=self.steps)

    @hookimpl
    def on_batch(self, run: Run, event: BatchReady) -> None:
        self.unread.append(event.batch.input_ids)
        self.total += event.batch.targets

    @hookimpl
    def on_gradients(self, run: Run, event: GradientsReady) -> None:
        self.steps += 1
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.config.boost / self.steps)

    @hookimpl
    def on_step_end(self, run: Run, event: StepEnd) -> None:
        if event.step == int(os.environ.get("STOP_AFTER", 0)):
            run.control.stop("as asked")

    @hookimpl
    def collect_metrics(self, run: Run, event: CollectMetrics) -> Mapping[str, Metric]:
        return {"train/rows_steps": Metric(float(self.steps), reduce="last")}

    @hookimpl
    def on_metrics(self, run: Run, event: MetricsReady) -> None:
        self._write(event="metrics", step=event.step, loss=round(event.metrics["train/loss"], self.config.digits))

    @hookimpl
    def evaluate(self, run: Run, event: Evaluate) -> Mapping[str, Metric]:
        nats, tokens = torch.zeros((), device=run.device), 0
        for batch in run.val_batches(max_batches=1):
            nats, tokens = nats + run.loss(batch), tokens + batch.targets
        return {"eval/rows_loss": Metric(nats / max(1, tokens), weight=tokens)}

    @hookimpl
    def on_eval_end(self, run: Run, event: EvalEnd) -> None:
        self._write(event="eval", step=event.step, names=sorted(event.metrics))

    @hookimpl
    def on_checkpoint_saved(self, run: Run, event: CheckpointSaved) -> None:
        self._write(event="saved", step=event.step, there=event.path.is_dir())

    @hookimpl
    def on_run_end(self, run: Run, event: RunEnd) -> None:
        self._write(event="end", status=event.status, step=event.step)

    @hookimpl
    def on_close(self, run: Run, event: Close) -> None:
        if self.file is not None:
            self.file.close()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "digest": self._read(), "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        if version != 3:
            raise ValueError(f"state of version {version}")
        self.steps, self.digest, self.total = state["steps"], state["digest"], state["total"]

    def describe(self) -> dict[str, Any]:
        return {"rows": self._read(), "targets": int(self.total)}

    def _read(self) -> str:
        for ids in self.unread:
            self.digest = hashlib.sha256(self.digest.encode() + ids.cpu().numpy().tobytes()).hexdigest()
        self.unread.clear()
        return self.digest

    def _write(self, **fields: Any) -> None:
        self.file.write(json.dumps(fields) + "\n")
