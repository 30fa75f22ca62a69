"""Logs a run to TensorBoard: metrics over steps, the configuration and the samples as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple import Plugin, Run, hookimpl, redacted
from gpt_simple.hooks import Close, EvalEnd, LogRecord, MetricsReady, RunStart

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@frozen
class TensorBoardConfig:
    directory: Annotated[str, Doc("where the event files are written, inside the run's directory")] = "tensorboard"
    flush_seconds: Annotated[int, Gt(0), Doc("how long a point may wait before it is on disk")] = 30


class TensorBoard(Plugin[TensorBoardConfig]):
    Config = TensorBoardConfig

    def __init__(self, config: TensorBoardConfig) -> None:
        super().__init__(config)
        self._writer: SummaryWriter | None = None

    @hookimpl
    def on_run_start(self, run: Run, event: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(run.output_dir / self.config.directory),
            # TensorBoard then drops the points of steps that this process repeats.
            purge_step=event.step + 1,
            flush_secs=self.config.flush_seconds,
        )
        text = json.dumps(redacted(run.config), indent=2)
        self._writer.add_text("config", f"```json\n{text}\n```", event.step + 1)

    @hookimpl
    def on_metrics(self, run: Run, event: MetricsReady) -> None:
        self._write(event.step, event.metrics)

    @hookimpl
    def on_eval_end(self, run: Run, event: EvalEnd) -> None:
        self._write(event.step, event.metrics)

    @hookimpl
    def on_log(self, run: Run, event: LogRecord) -> None:
        if self._writer is not None and event.name == "sample":
            # Indented text is not rendered as Markdown.
            self._writer.add_text("sample", "\n".join(f"    {line}" for line in event.message.splitlines()), event.step)

    @hookimpl
    def on_close(self, run: Run, event: Close) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
