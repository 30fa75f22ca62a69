"""How much memory a run needs, without using it: the engine's own step on fake tensors.

Eager runs are predicted as they are; of compiled ones the same formulas without fusion are a bound from above.
With several processes the buckets of DistributedDataParallel hold the gradients all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt_simple.config.schema import Config
from gpt_simple.data.loader import CHUNK_STEPS, CHUNK_TOKENS
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.process_state import process_as_found
from gpt_simple.errors import ConfigError
from gpt_simple.hooks.components import Registry, builtin_registry
from gpt_simple.hooks.events import BatchReady
from gpt_simple.model import loss
from gpt_simple.preflight.devices import Card, find_card
from gpt_simple.preflight.dry_run import Rehearsal
from gpt_simple.preflight.memory_tracker import CATEGORIES, MemoryTracker

if TYPE_CHECKING:
    from gpt_simple.preflight.preflight import Outlook

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}
_CUDA_BLOCK = 512
LARGEST_BATCH = 4096
"""No larger one is looked for."""


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


def predict_memory(
    config: Config,
    *,
    vocab_size: int,
    precision: str = "no",
    compiled: bool = False,
    world_size: int = 1,
    cuda: bool = False,
    registry: Registry | None = None,
) -> MemoryPrediction:
    """Predict for ``vocab_size`` tokens of the tokenizer and precision ``bf16``, ``fp16`` or ``no``.

    ``cuda``: as on a GPU, with its allocator's blocks and its rows in a chunk of the loss. Takes seconds, and memory
    for the names of things only. What plugins allocate is left out.
    """
    # Fake tensors of a device that this torch was not built for cannot be differentiated: the CPU stands in for it.
    device = torch.device("cpu")
    dtype = _DTYPES[precision]
    setting = Precision(precision, "", device, dtype, torch.amp.GradScaler("cpu", enabled=False))
    tracker = MemoryTracker(_CUDA_BLOCK if cuda else 1)
    rows_per_chunk = loss.ROWS_PER_CHUNK | ({"cpu": loss.ROWS_PER_CHUNK["cuda"]} if cuda else {})
    before = loss.ROWS_PER_CHUNK
    loss.ROWS_PER_CHUNK = rows_per_chunk
    try:
        with process_as_found(), FakeTensorMode(), tracker:
            rehearsal = Rehearsal.prepare(
                config,
                registry or builtin_registry(),
                setting,
                vocab_size=vocab_size,
                as_compiled=compiled,
                fake_tensors=True,
            )
            _watch(rehearsal, tracker, config, world_size, cuda)
    finally:
        loss.ROWS_PER_CHUNK = before
    copy = rehearsal.state_bytes() if config.training.background_save and config.training.save_steps else 0
    here = 0 if cuda else copy
    by_category = {**{name: tracker.peak_by.get(name, 0) for name in CATEGORIES}, "copies": here}
    by_phase = {phase: size for phase, size in tracker.peaks.items() if phase != "data"}
    place, phase = tracker.peak_place, tracker.peak_phase
    return MemoryPrediction(tracker.peak + here, by_category, phase, place, by_phase, compiled, copy)


def _watch(rehearsal: Rehearsal, tracker: MemoryTracker, config: Config, world_size: int, cuda: bool) -> None:
    """A step that makes the optimizer's state, one that has it from its start, and an evaluation.

    The second micro-batch of a step meets the gradients of the first; more of them need no more.
    """
    batch = rehearsal.rows.batch
    tracker.name([batch.input_ids, batch.labels], "data")
    tracker.phase = "data"
    held = _chunks(config, cuda)
    trained = {name: p for name, p in rehearsal.model.named_parameters() if p.requires_grad}
    buckets = {name: torch.zeros_like(parameter) for name, parameter in trained.items()} if world_size > 1 else {}
    tracker.name(buckets.values(), "gradients")
    _follow(rehearsal, tracker, trained, buckets)
    for micro_batches in (1, min(2, config.training.gradient_accumulation_steps)):
        rehearsal.rows.micro_batches = micro_batches
        rehearsal.step()
        states = (value for state in rehearsal.optimizer.state.values() for value in state.values())
        tracker.name([value for value in states if isinstance(value, torch.Tensor)], "optimizer")
    if config.training.eval_steps:
        tracker.phase, tracker.place = "evaluation", ""
        rehearsal.evaluate()
    del held


def _follow(
    rehearsal: Rehearsal,
    tracker: MemoryTracker,
    trained: Mapping[str, torch.Tensor],
    buckets: Mapping[str, torch.Tensor],
) -> None:
    """Keep the tracker's phase and place up to date through the hooks of torch and the engine.

    ``buckets`` stand for those of DistributedDataParallel, which take the gradients of a step's last micro-batch; the
    gradients of the others are kept beside them.
    """
    model, calls = rehearsal.model, rehearsal.calls
    is_last = False

    def enter(phase: str) -> None:
        tracker.phase, tracker.place = phase, ""

    def begin(run: Any, event: BatchReady) -> None:
        nonlocal is_last
        is_last = event.micro_batch + 1 == rehearsal.rows.micro_batches
        enter("forward")

    def at(name: str, *_: Any) -> None:
        tracker.place = name

    def has_gradient(name: str, parameter: torch.Tensor) -> None:
        tracker.place = name
        if parameter.grad is not None:
            tracker.name([parameter.grad], "gradients")
        if is_last and buckets:
            parameter.grad = buckets[name]

    calls.on_batch = begin
    calls.on_gradients = lambda run, event: enter("clipping")
    model.register_forward_hook(lambda module, inputs, output: enter("backward") if module.training else None)
    rehearsal.optimizer.register_step_pre_hook(lambda optimizer, arguments, options: enter("optimizer"))
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(partial(at, name))
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(partial(has_gradient, name))  # type: ignore[no-untyped-call]


def _chunks(config: Config, cuda: bool) -> list[torch.Tensor]:
    """The rows that the loader keeps on the device: on a GPU two chunks while it goes from one to the next.

    On a CPU a chunk is the training thread's own without ``data.num_workers``; what threads read is not counted.
    """
    training, length = config.training, config.data.max_length
    step_rows = training.gradient_accumulation_steps * training.per_device_batch_size
    steps = min(max(CHUNK_TOKENS // (step_rows * length), 1), CHUNK_STEPS)
    tensors = 4 if config.data.document_mask else 2
    chunks = 2 if cuda else 0 if config.data.num_workers else 1
    return [torch.empty(steps * step_rows, length, dtype=torch.int64) for _ in range(chunks * tensors)]


@frozen
class MemoryForecast:
    """A prediction, the card that it is compared with, and the batches that would fit if that was asked for."""

    prediction: MemoryPrediction
    precision: str
    compiled: bool
    card: Card | None
    batch: int | None = None
    batch_without_checkpointing: int | None = None
    largest_tried: int = LARGEST_BATCH


def forecast(outlook: Outlook) -> MemoryForecast:
    """Answer the questions about memory that were asked. Raises ConfigError for an unknown device."""
    config, questions = outlook.config, outlook.questions
    card = find_card(questions.device) if questions.device else _card_here()
    precision: str = config.training.mixed_precision or "auto"
    if precision == "auto":
        precision = card.precision if card is not None else "no"
    if card is not None and (precision, card.precision) == ("bf16", "fp16"):
        raise ConfigError(
            f"a {card.name} only emulates bf16",
            key="training.mixed_precision",
            hint='use "fp16", "no", or leave it out',
        )
    vocab_size = outlook.data.vocab_size
    if vocab_size is None:
        raise ConfigError("the vocabulary is not known before the data are prepared: set model.vocab_size")

    def predict(wished: Config) -> MemoryPrediction:
        return predict_memory(
            wished,
            vocab_size=vocab_size,
            precision=precision,
            compiled=config.training.compile,
            world_size=questions.world_size,
            cuda=card is not None,
            registry=outlook.registry,
        )

    result = MemoryForecast(predict(config), precision, config.training.compile, card)
    if not questions.fit:
        return result
    if card is None:
        raise ConfigError("--fit needs to know what to fit into: name a card with --device")
    batch = largest_batch(config, card.usable, predict)
    bare = evolve(config, training=evolve(config.training, gradient_checkpointing=False))
    without = largest_batch(bare, card.usable, predict) if config.training.gradient_checkpointing else batch
    return evolve(result, batch=batch, batch_without_checkpointing=without)


def largest_batch(config: Config, room: int, predict: Any) -> int:
    """The largest per_device_batch_size, up to 4,096, whose peak is at most ``room`` bytes; 0 if not even one row fits.

    The peak grows by about as much for each row, so two points give a guess that a few more correct.
    """

    def peak(rows: int) -> int:
        wished = evolve(config, training=evolve(config.training, per_device_batch_size=rows))
        size: int = predict(wished).peak
        return size

    known = {rows: peak(rows) for rows in (1, 2)}
    fits = max((rows for rows, size in known.items() if size <= room), default=0)
    over = min((rows for rows, size in known.items() if size > room), default=LARGEST_BATCH + 1)
    while over - fits > 1:
        low, high = (fits, over) if over in known else sorted(known)[-2:]
        slope = max(1.0, (known[high] - known[low]) / (high - low))
        guess = min(max(int(low + (room - known[low]) / slope), fits + 1), over - 1)
        known[guess] = peak(guess)
        fits, over = (guess, over) if known[guess] <= room else (fits, guess)
    return fits


def _card_here() -> Card | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    modern = torch.cuda.get_device_capability(0) >= (8, 0)
    return Card(properties.name, properties.total_memory, "bf16" if modern else "fp16")
