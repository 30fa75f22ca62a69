"""``preflight``: the facts of a run that has not started, for ``check_config`` and ``check_runtime``.

Plugins are typed against the protocol ``Preflight``. Each part is computed when it is first read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from gpt_simple.config.schema import Config
    from gpt_simple.hardware import GpuSpec
    from gpt_simple.hooks.components import Component, Registry


@frozen
class PreflightOptions:
    """What to check.

    ``launching``: a run starts next and reads its data and checkpoints itself. ``force``: the run discards the content
    of its output directory. ``world_size``: the number of processes. ``memory``: predict the memory, for that of
    ``device`` (a name or bytes); ``fit``: also find the largest batch. ``probe``: measure real steps. ``mfu``: the
    model FLOPs utilisation that an estimate without steps assumes.
    """

    launching: bool = False
    force: bool = False
    world_size: int = 1
    memory: bool = False
    device: str | None = None
    fit: bool = False
    probe: bool = False
    mfu: float = 0.4


@frozen
class BatchStage:
    """The batches of the optimizer steps from ``first_step`` on: one stage of ``training.warmup_stages``, or the rest.

    On each process a step has ``accumulation`` micro-batches of shape [rows, length]. Over all processes it reads
    ``samples`` rows of ``data.max_length``, which are ``tokens`` positions.
    """

    first_step: int
    accumulation: int
    rows: int
    length: int
    samples: int
    tokens: int


@frozen
class InspectedData:
    """The data, as far as they are known.

    ``estimated``: the data are not prepared, so numbers of tokens are estimates. ``unpacked``: the documents are not
    packed in this way yet, so numbers of rows are lower bounds. ``vocab_size`` is an upper bound for the tokenizer's,
    None if only training the tokenizer can find it. ``train_tokens`` and ``val_tokens`` count targets, None if unknown;
    ``val_at_most`` is an upper bound for the latter. ``total`` is the number of rows to read, None if rows repeat or it
    is unknown. With a curriculum, ``rows_taken(samples)`` counts the rows of each bucket among the first samples.
    """

    source: str
    directory: Path | None
    vocab_size: int | None
    estimated: bool
    text_bytes: int | None
    train_tokens: int | None
    val_tokens: int | None
    buckets: Mapping[str, int]
    val_rows: int
    fingerprints: Mapping[str, str] | None
    val_at_most: int | None = None
    total: int | None = None
    rows_taken: Callable[[int], Mapping[str, int]] | None = None
    unpacked: bool = False


@frozen
class ConfigChanges:
    """Differences between the configuration of a resumed run and that before.

    ``lines``: one for each key, as ``key old -> new``. ``order``: the effect on the order of samples, or empty.
    """

    lines: Mapping[str, str]
    order: str = ""

    def __str__(self) -> str:
        return "; ".join(self.lines.values()) + self.order


@frozen
class PlannedResume:
    """``scratch``, ``resume`` from ``path`` at ``step`` after ``samples`` samples, or ``finished``.

    ``skipped`` are newer checkpoints that are damaged, each with the reason. ``guarantee`` is the resume guarantee:
    ``bit-exact``, ``order-exact: ...`` or ``changed: ...``, from the configuration, the data and the installed torch.
    ``finished`` says why the run is complete, and what to change to go on.
    ``store`` names the checkpoint store that the launch fetches the checkpoint from; only its step is known then.
    ``gradient_checkpointing`` is that of the run, which ``"auto"`` keeps; None from scratch.
    """

    kind: Literal["scratch", "resume", "finished"]
    step: int = 0
    path: Path | None = None
    guarantee: str = ""
    changes: ConfigChanges | None = None
    skipped: Sequence[tuple[Path, str]] = ()
    samples: int = 0
    finished: str = ""
    store: str = ""
    gradient_checkpointing: bool | int | None = None


@frozen
class CheckedOutput:
    """The output directory and its space, in bytes.

    ``checkpoint_bytes`` is the size of a checkpoint, None if the model or the optimizer is a plugin's and none was
    written yet; ``tensor_bytes`` of it are certain. ``most`` is the largest number of checkpoints on disk at once, with
    the one being written. The run adds ``needed``; the file system has ``free``, and ``--force`` gives back ``freed``
    before the first step.
    """

    directory: Path
    checkpoint_bytes: int | None
    tensor_bytes: int
    most: int
    needed: int | None
    free: int
    freed: int

    @property
    def holds_one(self) -> bool:
        """Whether there is space for one checkpoint, or none is written."""
        return not self.needed or self.tensor_bytes <= self.free + self.freed


@frozen
class Environment:
    """This machine.

    ``gpus`` are the models of the NVIDIA GPUs that a process sees. ``compiler`` is the path of the compiler that
    torch.compile needs, on a CPU for C++ and on a GPU for C; if it is empty, ``missing_compiler`` names those that were
    searched for. ``broken`` has a sentence for each installed plugin that cannot be used. ``wandb_key``: whether a key
    is set (never the key). ``seconds_left`` is the rest of the SLURM time limit, or None. ``backends`` are those of
    ``torch.compile``.
    """

    python: str
    packages: Mapping[str, str]
    driver: str
    gpus: Sequence[str]
    compiler: str
    missing_compiler: str
    broken: Sequence[str]
    wandb_key: bool
    wandb_offline: bool
    seconds_left: float | None
    backends: Sequence[str]

    @property
    def torch_has_cuda(self) -> bool:
        """Whether the installed torch is built for CUDA: the local part of its version is not ``+cpu``."""
        return not self.packages.get("torch", "").endswith("+cpu")


@frozen
class MemoryPrediction:
    """The peak memory of one process's tensors, in bytes.

    The peak is in ``phase`` (forward, backward, clipping, optimizer, evaluation) at ``place``. ``by_category`` divides
    it into parameters, gradients, optimizer, activations, temporaries and data; ``by_phase`` is the peak of each phase.
    ``is_bound``: ``peak`` is an upper bound (compiled), else it is exact (eager). On a GPU the bound of a model of the
    family ``gpt`` is at most 15 % above. ``copy`` is the host memory of the state that ``background_save`` writes, from
    the first save on; on a CPU ``peak`` includes it and ``by_category`` has it as ``copies``.
    ``block_activations``: what the first block keeps for the backward pass.
    """

    peak: int
    by_category: Mapping[str, int]
    phase: str
    place: str
    by_phase: Mapping[str, int]
    is_bound: bool
    copy: int = 0
    block_activations: int = 0

    @property
    def training_peak(self) -> int:
        """The peak of an optimizer step, in bytes, before the first save."""
        return max(size for phase, size in self.by_phase.items() if phase != "evaluation")


@frozen
class MemoryForecast:
    """A prediction, the GPU that it is compared with, and with ``fit`` the largest ``per_device_batch_size`` that fits.

    ``batch`` is None if none fits, and ``batch_without_checkpointing`` is that without gradient checkpointing. Batches
    above ``largest_tried`` were not tried. The prediction is for ``gradient_checkpointing``: what is configured, or
    what ``"auto"`` means here, with the reason.
    """

    prediction: MemoryPrediction
    precision: str
    gpu: GpuSpec | None
    largest_tried: int
    batch: int | None = None
    batch_without_checkpointing: int | None = None
    gradient_checkpointing: bool | int = True
    gradient_checkpointing_why: str = ""


@frozen
class ThroughputEstimate:
    """The time of the ``steps_left``, in seconds. ``basis`` says where the numbers come from.

    ``evaluation_seconds`` is None while the data are not prepared, because the validation split is unknown then.
    """

    measured: bool
    basis: str
    tokens_per_second: float
    step_seconds: float
    first_step_seconds: float
    steps_left: int
    training_seconds: float
    evaluation_seconds: float | None
    saving_seconds: float

    @property
    def total_seconds(self) -> float:
        """From the first step to the last checkpoint."""
        stepping = self.first_step_seconds + self.training_seconds
        return stepping + (self.evaluation_seconds or 0.0) + self.saving_seconds

    def fields(self) -> dict[str, Any]:
        """The estimate for machines."""
        names = ("measured", "basis", "tokens_per_second", "step_seconds", "first_step_seconds", "steps_left")
        return {name: getattr(self, name) for name in (*names, "total_seconds")}


class Preflight(Protocol):
    """A run that has not started. A part raises GptSimpleError if the run would be refused because of it."""

    @property
    def config(self) -> Config: ...

    @property
    def options(self) -> PreflightOptions: ...

    @property
    def registry(self) -> Registry:
        """The components that the configuration can choose from."""

    @property
    def plugins(self) -> Mapping[str, str]:
        """The plugins that the run loads, in call order, each with its distribution and version."""

    @property
    def components(self) -> Sequence[Component]:
        """The components of plugins that the configuration chooses."""

    def is_default(self, key: str) -> bool:
        """Whether this dotted key has its default because it is not set anywhere."""

    @property
    def rows_per_step(self) -> int:
        """Samples of an optimizer step after the warm-up stages, over all micro-batches and processes."""

    @property
    def stages(self) -> Sequence[BatchStage]:
        """The stages of ``training.warmup_stages`` that the run reaches, and the rest of its steps."""

    def samples_after(self, step: int) -> int:
        """Samples that are read up to the end of ``step``, not before ``steps_done``."""

    def last_step(self, samples: int) -> int:
        """The last step that reads none but the first ``samples``, not before ``steps_done``."""

    @property
    def steps_done(self) -> int:
        """Steps before this launch; 0 if ``resume`` raises."""

    @property
    def samples_done(self) -> int:
        """Samples before this launch; 0 if ``resume`` raises."""

    @property
    def samples(self) -> int:
        """Samples of the run from its first step on, including those before a resume with another batch size."""

    @property
    def data(self) -> InspectedData:
        """The data, as far as they are known without reading them. Raises DataError or ConfigError."""

    @property
    def resume(self) -> PlannedResume:
        """Where the run would start. Raises CheckpointError."""

    @property
    def output(self) -> CheckedOutput:
        """Where and how much the run would write. Raises ConfigError or CheckpointError."""

    @property
    def environment(self) -> Environment:
        """This machine, from package metadata, environment variables and the system."""

    @property
    def memory(self) -> MemoryForecast:
        """The predicted peak memory of one process; imports torch. Raises what ``data`` raises, or ConfigError."""

    @property
    def runtime(self) -> ThroughputEstimate | None:
        """The run's speed: measured with ``probe`` (imports torch), estimated for a known device, or None.

        Raises what ``data`` and ``output`` raise, or ConfigError.
        """

    def check_time_budget(self) -> None:
        """Raise ConfigError for a time budget that the run would refuse, if the model's size is known."""

    def predict_memory(
        self,
        *,
        vocab_size: int,
        precision: str,
        compiled: bool,
        world_size: int,
        cuda: bool,
        steps: tuple[int, int] | None = None,
        gradient_checkpointing: bool | int | None = None,
    ) -> MemoryPrediction:
        """Predict the memory for a tokenizer of ``vocab_size`` and precision ``bf16``, ``fp16`` or ``no``.

        ``cuda``: as on a GPU. ``steps``: the first and the last step, None for all of the run.
        ``gradient_checkpointing``: None for that of the configuration, of which ``"auto"`` counts as true. Memory of
        plugins is not included. Imports torch and takes seconds.
        """
