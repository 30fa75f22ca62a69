"""``run``: the view of a training run that plugins get.

Plugins are typed against this protocol; the engine implements it. Anything that is not here is private to the engine.
``SINCE``, ``CHECKED``, ``TOGETHER`` and ``ONLY_IN`` have where each member may be used: the engine and the
documentation read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen

if TYPE_CHECKING:
    import torch

    from gpt_simple.config.schema import Config
    from gpt_simple.hooks.batch import Batch, Tokenizer


MISSING: Any = type("Missing", (), {"__repr__": lambda self: "<missing>"})()
"""The default of an argument that has none."""


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
        """Ask for a resumable stop (exit code 75) at the end of this step. The same command goes on."""

    def halt(self, reason: str) -> None:
        """Ask for a stop that needs a person (exit code 76) at the end of this step."""

    def finish(self, reason: str) -> None:
        """Complete the run (exit code 0) at the end of this step: log, save and evaluate, as after the last step.

        A request in an evaluation takes effect right after it, without another step. The checkpoint holds ``reason``,
        and a later launch reports it and does nothing, unless it has a larger ``training.max_steps``, other options of
        the data, or other plugins or options of them. A halt in the same step has precedence; a stop leaves out the
        last evaluation; the reason is not kept in the step ``training.max_steps``, which completes the run anyway.
        """

    def rebuild_optimizer(self, reason: str) -> None:
        """Ask for an optimizer of the parameters that the model has and trains now, at the end of this step.

        For a plugin that has unfrozen, frozen, added, replaced or removed parameters, in the same way on every process.
        The component builds the optimizer, ``on_optimizer_built`` is called again, and a parameter that has the name
        and shape of an earlier one keeps its state. Checkpoints record which parameters are trained.
        """

    def skip_step(self, flag: torch.Tensor) -> None:
        """Skip this step if ``flag`` (0-d bool on the device) is true, on any process.

        Raises PluginError outside of ``on_gradients``. The log names the plugin.
        """


class Log(Protocol):
    """One line for people, and its fields for machines. Only lines of the main process are kept.

    Raises PluginError for a line that no logger could write: a message that is no text, and a field that JSON cannot
    hold. An object of another type is written as its text.
    """

    def info(self, message: str, *, name: str = "info", **fields: Any) -> None:
        """A line of the run's course. ``name`` is a word for machines."""

    def warning(self, message: str, *, name: str = "warning", **fields: Any) -> None:
        """A line about what somebody should look at. ``name`` is a word for machines."""

    def error(self, message: str, *, name: str = "error", **fields: Any) -> None:
        """A line about what has failed. ``name`` is a word for machines."""


class Comm(Protocol):
    """Collectives for hooks that every process runs at once. In other hooks they raise instead of hanging."""

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

        The two newest valid ones and the one just written always stay. A checkpoint store follows if it can remove.
        Returns what was removed. Call it on the main process alone.
        """


class Run(Protocol):
    """The run. Reading an attribute never waits for the device."""

    @property
    def config(self) -> Config:
        """The whole configuration, read-only. ``run.config.plugins.tables`` has the options of each plugin."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def world_size(self) -> int:
        """The number of processes."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, the one of rank 0."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""

    @property
    def model(self) -> torch.nn.Module:
        """The raw module; its parameters have the names that they have in a checkpoint.

        On the meta device in ``check_runtime``.
        """

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The raw optimizer, to be read. Another one after ``rebuild_optimizer``: keep no reference to it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""

    @property
    def step(self) -> int:
        """The last optimizer step that is finished (0 before the first). Restored from ``on_checkpoint_loaded`` on."""

    @property
    def tokens(self) -> int:
        """Positions consumed since step 0, over all processes. Restored from ``on_checkpoint_loaded`` on."""

    @property
    def run_id(self) -> str:
        """8 lower-case letters and digits, made with the run directory and kept through every resume."""

    @property
    def output_dir(self) -> Path:
        """``training.output_dir``, the run directory. It exists from ``on_model_built`` on."""

    @property
    def log(self) -> Log:
        """The run's log."""

    @property
    def control(self) -> Control:
        """Requests to the engine: save, evaluate, stop and others."""

    @property
    def comm(self) -> Comm:
        """Collectives of all processes."""

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints in the run directory."""

    def plugin(self, name: str, default: Any = MISSING) -> Any:
        """The active plugin of a name: its instance on this process, for a plugin that ``requires`` or ``uses`` it.

        Returns ``default`` where the plugin is not active, has failed and was switched off, or is not
        called, as a plugin of the main process on the others. Without a ``default`` that raises PluginError.
        """

    def facts(self) -> dict[str, Any]:
        """Facts of the run: parameters, flops_per_token, peak_flops, tokens_per_step, floor, precision, ...

        ``tokens_per_step`` counts those after the warm-up stages. ``stages`` has the fields of a ``BatchStage`` for
        each stage that the run reaches. ``gradient_checkpointing`` is the decided one where the configuration has
        ``"auto"``. Before ``on_run_start``, as in ``check_runtime``, there are only ``precision`` (``bf16``, ``fp16``
        or ``no``) and ``precision_why``.
        """

    def record(self, key: str, value: Any) -> None:
        """Keep a fact of a plugin in run.json, such as the id of a tracker's run: durable when this returns.

        ``key`` begins with the plugin's name (``"csvlog.path"``); ``value`` is what JSON can
        hold, without NaN, else PluginError. Secrets of the configuration in it are hidden. The main process writes; a
        plugin on all processes calls it on all of them. A fact is no part of a checkpoint: it survives a crash before
        the first one, and may be of a later step than the one a launch resumes from. ``--force`` and a branch in
        another directory start without facts. The file is written with each new value: not for every step.
        """

    def recorded(self, key: str, default: Any = None) -> Any:
        """What ``record`` has kept under ``key``, in this launch or an earlier one, else ``default``."""

    def val_batches(self, max_batches: int | None = None, bucket: str | None = None) -> Iterator[Batch]:
        """This process's share of the val split, or of one bucket of it, on the device.

        ``max_batches`` limits the rows of all processes to that number times ``per_device_batch_size``: the same rows
        with any number of processes. ``run.facts()["data"]["val"]["buckets"]`` maps each bucket to its rows. Raises
        PluginError for any other name.
        """

    def batches(self, sample_ids: Iterable[int]) -> Iterator[Batch]:
        """The rows of these samples of the training order, on the device: for probes.

        A process gets all of them, in the order of ``sample_ids``, in batches of ``per_device_batch_size`` rows; the
        last batch is filled with rows without a target. So the batches are the same on every process, with any number
        of processes, and nothing waits for another process. A process takes a share of them with
        ``ids[run.rank :: run.world_size]``. An id is a number in the order of samples, as ``batch.first_sample`` is; a
        sample may be read before training reads it, and again. The position in the data does not change. Raises
        PluginError for what is no sample, and for data that are a stream.
        """

    def loss(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy of a batch (nats, 0-d, on the device), by the compiled model.

        With ``training.parallel = "fsdp"`` all processes compute it together, each of a batch of its own: PluginError
        where they do not, as with ``comm``. A plugin with ``ranks = "all"`` calls it on all of them.
        """

    def weights(self, weights: Mapping[str, torch.Tensor] | str) -> AbstractContextManager[None]:
        """Put other weights into the model: a set by its name, or one tensor for each parameter by its name.

        Inside, ``run.model``, ``run.loss`` and ``run.generate`` use them. Contents are exchanged in place, so each
        tensor holds the parameter's content meanwhile, and always back. This takes the memory of one parameter. The
        tensors have the parameters' shapes and dtypes and may be on another device. ``"live"`` are the model's own
        weights. Each process exchanges its own. Raises PluginError, before anything is exchanged, for an unknown name,
        and with a list of all names and tensors that do not fit::

            with run.evaluating(), run.weights("ema"):
                text = run.generate("Once")
        """

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
    ) -> str:
        """Prompt and continuation from the raw, uncompiled module. Training is not affected.

        With ``training.parallel = "fsdp"`` all processes generate one text together, as ``loss`` has it.
        """

    def peak_memory(self) -> int:
        """The most bytes used so far: allocated on a GPU in this run, else the process's resident set."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Eval mode, no_grad, autocast as in training, and an RNG of its own; all restored afterwards.

        An optimizer with methods ``train()`` and ``eval()`` is in eval mode: the parameters are those that it has for
        evaluation. Afterwards weights and state are to the bit what they were. Meanwhile the device holds a copy of the
        optimizer's parameters.
        """


SINCE: dict[str, str] = {
    **dict.fromkeys(("model", "tokenizer", "checkpoints", "evaluating", "generate"), "on_model_built"),
    "optimizer": "on_optimizer_built",
    **dict.fromkeys(("run_id", "loss", "val_batches", "batches", "record", "recorded", "weights"), "on_run_start"),
}
"""The members of ``Run`` that are not there from the beginning, and the hook that has them first.

Used earlier they raise PluginError.
"""

CHECKED = ("model", "tokenizer", "checkpoints", "evaluating")
"""The members of ``SINCE`` that ``check_runtime``, which comes before, has too."""

TOGETHER = ("val_batches", "comm.sum", "comm.barrier")
"""What needs all processes at once. Outside of a hook that is ``together`` it raises PluginError."""

ONLY_IN = {"control.skip_step": "on_gradients"}
"""What raises PluginError outside of one hook."""
