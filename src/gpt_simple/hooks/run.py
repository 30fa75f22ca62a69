"""``run``: the view of a training run that plugins get.

Plugins are typed against this protocol; the engine implements it. Anything that is not here is private to the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen

if TYPE_CHECKING:
    import torch

    from gpt_simple.config.schema import Config
    from gpt_simple.hooks.batch import Batch, Tokenizer


@frozen
class CheckpointInfo:
    """A published checkpoint."""

    step: int
    path: Path


class Control(Protocol):
    """Requests of this process. All processes decide on them together at the end of the step."""

    def save(self, reason: str) -> None:
        """Ask for a checkpoint at the end of this step."""

    def evaluate(self, reason: str) -> None:
        """Ask for an evaluation at the end of this step."""

    def stop(self, reason: str) -> None:
        """Ask for a resumable stop (exit code 75) at the end of this step."""

    def halt(self, reason: str) -> None:
        """Ask for a stop that needs a person (exit code 76) at the end of this step."""

    def skip_step(self, flag: torch.Tensor) -> None:
        """Skip this step if ``flag`` (0-d bool on the device) is true, on any process.

        Raises PluginError outside of ``on_gradients``. The log names the plugin.
        """


class Log(Protocol):
    """One line for people, and its fields for machines. Only lines of the main process are kept.

    Raises PluginError for a line that no logger could write: a message that is no text, and a field that JSON cannot
    hold. An object of another type is written as its text.
    """

    def info(self, message: str, *, name: str = "info", **fields: Any) -> None: ...

    def warning(self, message: str, *, name: str = "warning", **fields: Any) -> None: ...

    def error(self, message: str, *, name: str = "error", **fields: Any) -> None: ...


class Comm(Protocol):
    """Collectives for hooks that run on every process. In other hooks they raise instead of hanging."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""

    def barrier(self) -> None:
        """Wait for all processes."""


class Checkpoints(Protocol):
    """The checkpoints of this run."""

    def list(self) -> Sequence[CheckpointInfo]:
        """The published checkpoints, oldest first."""

    def prune(
        self, *, keep_last: int | None, keep_every: int | None = None, protect: Iterable[int] = ()
    ) -> Sequence[CheckpointInfo]:
        """Remove all but the newest ``keep_last``, multiples of ``keep_every`` and the steps in ``protect``.

        The two newest valid ones and the one just written always stay. Returns what was removed.
        """


class Run(Protocol):
    """The run. Reading an attribute never waits for the device."""

    @property
    def config(self) -> Config: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def model(self) -> torch.nn.Module:
        """The raw module; its parameters have the names that they have in a checkpoint."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def step(self) -> int:
        """The last optimizer step that is finished (0 before the first)."""

    @property
    def tokens(self) -> int:
        """Positions consumed since step 0, over all processes."""

    @property
    def run_id(self) -> str:
        """8 lower-case letters and digits, made with the run directory and kept through every resume."""

    @property
    def output_dir(self) -> Path: ...

    @property
    def log(self) -> Log: ...

    @property
    def control(self) -> Control: ...

    @property
    def comm(self) -> Comm: ...

    @property
    def checkpoints(self) -> Checkpoints: ...

    def facts(self) -> dict[str, Any]:
        """Facts of the run: parameters, flops_per_token, peak_flops, tokens_per_step, floor, precision, ..."""

    def val_batches(self, max_batches: int | None = None) -> Iterator[Batch]:
        """This process's share of the val split, on the device.

        ``max_batches`` limits the rows of all processes to that number times ``per_device_batch_size``.
        """

    def loss(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy of a batch (nats, 0-d, on the device), by the compiled model."""

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
    ) -> str:
        """Prompt and continuation from the raw, uncompiled module. Training is not affected."""

    def peak_memory(self) -> int:
        """The most bytes used so far: allocated on a GPU, else the process's resident set."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Eval mode, no_grad, autocast as in training, and an RNG of its own; all restored afterwards."""
