"""``preflight``: what a check can know of a run that has not started, beyond its configuration.

Plugins are typed against the protocol ``Preflight``, which ``check_config`` and ``check_runtime`` receive. Each part is
computed when it is first read.
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
    """What the checks are for.

    ``launching``: a run is about to start and reads its data and checkpoints itself in a moment. ``force``: it would
    discard what is in its output directory. ``world_size``: processes. ``memory`` asks for a prediction, for the memory
    of ``device`` (a name or bytes), ``fit`` for the largest batch in it; ``probe`` for real steps; ``mfu`` is what an
    estimate without steps assumes.
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
class InspectedData:
    """What is known of the data. ``estimated``: nothing is prepared yet, so numbers of tokens are guesses;
    ``unpacked``: numbers of rows are lower bounds, because documents were not packed in this way yet.

    ``vocab_size`` is that of the tokenizer, at most, and None where only training it would tell. ``train_tokens`` and
    ``val_tokens`` count targets, None where nobody knows; a val split has at most ``val_at_most``. ``total`` is the
    number of rows there are to read, None where they are read again or nobody knows. With a curriculum,
    ``rows_taken(samples)`` counts the rows of each bucket among the first samples.
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
    """What is configured otherwise in a resumed run than before.

    ``lines``: one for each key, as ``key old -> new``. ``order`` says what becomes of the order of samples, if that
    changes.
    """

    lines: Mapping[str, str]
    order: str = ""

    def __str__(self) -> str:
        return "; ".join(self.lines.values()) + self.order


@frozen
class PlannedResume:
    """``scratch``, ``resume`` from ``path`` at ``step`` after so many ``samples``, or ``finished``; ``skipped`` are
    damaged checkpoints that are newer.

    ``guarantee`` is what a resume keeps: ``bit-exact``, ``order-exact: ...`` or ``changed: ...``, as far as the
    configuration, the data and the installed torch tell. ``changes``: what is configured otherwise than before.
    """

    kind: Literal["scratch", "resume", "finished"]
    step: int = 0
    path: Path | None = None
    guarantee: str = ""
    changes: ConfigChanges | None = None
    skipped: Sequence[tuple[Path, str]] = ()
    samples: int = 0


@frozen
class CheckedOutput:
    """``checkpoint_bytes`` is None where the model or the optimizer is a plugin's and none was written yet.

    ``tensor_bytes`` of it are certain. ``most`` is how many checkpoints the run has on disk at once at most, with the
    one being written; ``needed`` the bytes that it adds to what is there, ``free`` what the file system has, and
    ``freed`` what ``--force`` gives back before the first step.
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
        """Whether there is room for a checkpoint, or none is to be written."""
        return not self.needed or self.tensor_bytes <= self.free + self.freed


@frozen
class Environment:
    """``gpus`` are the models that the NVIDIA driver lists; ``broken`` a sentence for each plugin that cannot be used.

    ``compiler`` is the path of a C++ compiler or empty, and ``missing_compiler`` what was looked for then; ``backends``
    are those that ``torch.compile`` is known to have; ``seconds_left`` what SLURM still grants or None, and
    ``wandb_key`` whether one is at hand (never the key).
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
        """Whether the installed torch was built for CUDA, by its version's local part (``+cpu``)."""
        return not self.packages.get("torch", "").endswith("+cpu")


@frozen
class MemoryPrediction:
    """The most bytes of tensors that one process has at a time.

    ``by_category`` divides ``peak`` into parameters, gradients, optimizer, activations, temporaries and data at that
    moment, which is in ``phase`` (forward, backward, clipping, optimizer, evaluation) at ``place``; ``by_phase`` is the
    most in each phase. ``is_bound``: the truth is at most this (compiled), else it is this (eager). ``copy`` bytes of
    host memory hold the state that ``background_save`` writes, from the first save on; on a CPU they are in ``peak``
    and, as ``copies``, in ``by_category``.
    """

    peak: int
    by_category: Mapping[str, int]
    phase: str
    place: str
    by_phase: Mapping[str, int]
    is_bound: bool
    copy: int = 0

    @property
    def training_peak(self) -> int:
        """The most in an optimizer step, without evaluation and before the first save."""
        return max(size for phase, size in self.by_phase.items() if phase != "evaluation")


@frozen
class MemoryForecast:
    """A prediction, the GPU that it is compared with, and the batches that would fit if that was asked for."""

    prediction: MemoryPrediction
    precision: str
    gpu: GpuSpec | None
    largest_tried: int
    batch: int | None = None
    batch_without_checkpointing: int | None = None


@frozen
class ThroughputEstimate:
    """Seconds of the ``steps_left`` by what they go to. ``basis`` says where the numbers come from.

    ``evaluation_seconds`` is None while the data are not prepared, since their validation split is not known then.
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
        """The same for machines."""
        names = ("measured", "basis", "tokens_per_second", "step_seconds", "first_step_seconds", "steps_left")
        return {name: getattr(self, name) for name in (*names, "total_seconds")}


class Preflight(Protocol):
    """A run that has not started. A part raises GptSimpleError where the run would be refused."""

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
        """The chosen parts that plugins bring."""

    def is_default(self, key: str) -> bool:
        """Whether nobody set this dotted key."""

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all micro-batches and processes."""

    @property
    def steps_done(self) -> int:
        """Steps before this launch; none where ``resume`` raises."""

    @property
    def samples_done(self) -> int:
        """Samples before this launch; none where ``resume`` raises."""

    @property
    def samples(self) -> int:
        """Samples of the run from its first step on, those of another batch before a resume included."""

    @property
    def data(self) -> InspectedData:
        """The data as far as they can be known without reading them. Raises DataError or ConfigError."""

    @property
    def resume(self) -> PlannedResume:
        """What the run would start from. Raises CheckpointError."""

    @property
    def output(self) -> CheckedOutput:
        """Where the run would write and how much. Raises ConfigError or CheckpointError."""

    @property
    def environment(self) -> Environment:
        """This machine, from package metadata, the environment's variables and the system."""

    @property
    def memory(self) -> MemoryForecast:
        """The predicted peak of one process; imports torch. Raises what ``data`` raises, or ConfigError."""

    @property
    def runtime(self) -> ThroughputEstimate | None:
        """How fast the run would be: measured with ``probe`` (imports torch), estimated for a known device, or None.

        Raises what ``data`` and ``output`` raise, or ConfigError.
        """

    def check_time_budget(self) -> None:
        """Raise ConfigError for a time budget that the run would refuse, as far as the model's size is known here."""

    def predict_memory(
        self, *, vocab_size: int, precision: str, compiled: bool, world_size: int, cuda: bool
    ) -> MemoryPrediction:
        """Predict for ``vocab_size`` tokens of the tokenizer and precision ``bf16``, ``fp16`` or ``no``; imports torch.

        ``cuda``: as on a GPU. Takes seconds. What plugins allocate is left out.
        """
