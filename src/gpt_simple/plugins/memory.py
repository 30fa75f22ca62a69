"""Predicts the peak of memory before the run, and compares it with the first real steps.

``gpt-simple validate --memory`` shows the prediction alone. In a run (``-p memory``) the first two steps are measured:
by the allocator of a GPU, or on a CPU by the allocations that torch's profiler records. The error is logged once, and
goes into the summary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpt_simple import Finding, GptSimpleError
from gpt_simple.hooks import NoConfig, Plugin, hookimpl

if TYPE_CHECKING:
    from gpt_simple import Config
    from gpt_simple.hooks import MemoryPrediction, Preflight, Run
    from gpt_simple.hooks import events as ev

_MIB, _GIB = 2**20, 2**30
_SHOWN = _MIB // 20
_MEASURED_STEPS = 2
"""The first step allocates the optimizer's state; the second has all of it from its start."""


class Memory(Plugin[NoConfig]):
    """Runs on the main process: the others need the same."""

    after = ("validate",)

    _preflight: Preflight
    _prediction: MemoryPrediction
    _predicted = 0
    _measured: int | None = None
    _held: int | None = None
    """Bytes of tensors that existed before counting began; None if nothing is counted."""
    _last_step = 0

    @hookimpl
    def check_config(self, config: Config, preflight: Preflight) -> list[Finding]:
        self._preflight = preflight
        if not preflight.options.memory:
            return []
        try:
            return list(_forecast(preflight))
        except GptSimpleError as error:
            return Finding.of_error(error, "memory-refused")

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        self._prediction = self._preflight.predict_memory(
            vocab_size=run.tokenizer.vocab_size,
            precision=event.facts["precision"],
            compiled=event.facts["compile"] != "off",
            world_size=run.world_size,
            cuda=run.device.type == "cuda",
            steps=(event.step + 1, max(event.step + 1, min(event.step + _MEASURED_STEPS, event.max_steps))),
            gradient_checkpointing=event.facts["gradient_checkpointing"],
        )
        self._last_step = event.step + _MEASURED_STEPS
        self._predicted = self._prediction.training_peak
        if run.device.type != "cpu":
            return
        every = run.config.training.save_steps
        if every and (event.step + 1) % every == 0:
            self._predicted += self._prediction.copy  # during the second step the save of the first holds a copy
        parts = [getattr(each, "to_local", lambda each=each: each)() for each in run.model.parameters()]
        held = {part.data_ptr(): part.nbytes for part in (*parts, *run.model.buffers())}
        self._held = sum(held.values())
        if event.resumed_from is not None:
            self._held += self._prediction.by_category["optimizer"]
        gc.collect()  # garbage that is freed while counting would be subtracted
        start_counting()

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        if self._measured is not None or not (event.step == self._last_step or event.is_last):
            return
        if self._held is None:
            self._measured = run.peak_memory()
        else:
            self._measured, self._held = self._held + stop_counting(), None
        at_most = "at most " if self._prediction.is_bound else ""
        run.log.info(
            f"memory of {_MEASURED_STEPS} steps: predicted {at_most}{self._predicted / _MIB:,.1f} MiB, measured"
            f" {self._measured / _MIB:,.1f} MiB ({self._error:+.1%})",
            name="memory",
            predicted=self._predicted,
            measured=self._measured,
            error=self._error,
        )

    @hookimpl
    def on_close(self, run: Run, event: ev.Close) -> None:
        if self._held is not None:
            stop_counting()

    def describe(self) -> dict[str, Any]:
        if self._measured is None:
            return {}
        return {
            "predicted peak MiB": round(self._predicted / _MIB, 1),
            "measured peak MiB": round(self._measured / _MIB, 1),
            "prediction error": f"{self._error:+.1%}",
        }

    @property
    def _error(self) -> float:
        assert self._measured is not None
        return self._predicted / self._measured - 1


def start_counting() -> None:
    """Have torch record every CPU allocation of this thread. Its newer profiler would print on stderr."""
    import torch
    from torch._C._profiler import _ExperimentalConfig

    recorder: Any = torch.autograd  # its types lack the profiler
    with_memory = (False, True, False, False, False)  # shapes, memory, stack, FLOPs, modules
    recorder._enable_profiler_legacy(
        recorder.ProfilerConfig(recorder.ProfilerState.CPU, *with_memory, _ExperimentalConfig())
    )


def stop_counting() -> int:
    """The peak of bytes allocated since ``start_counting``, beyond those of earlier tensors."""
    import torch

    recorder: Any = torch.autograd
    now = most = 0
    for records in recorder._disable_profiler_legacy():
        for record in records:
            if record.kind() == "memory_alloc":
                now += record.cpu_memory_usage()
                most = max(most, now)
    return most


def _forecast(preflight: Preflight) -> Iterator[Finding]:
    forecast, configured = preflight.memory, preflight.config.training.gradient_checkpointing
    prediction = forecast.prediction
    parts = ", ".join(f"{name} {_size(size)}" for name, size in prediction.by_category.items() if size > _SHOWN)
    near = f" near {prediction.place}" if prediction.place else ""
    at_most = "at most " if prediction.is_bound else ""
    precision = "fp32" if forecast.precision == "no" else forecast.precision
    checkpointing = "with" if forecast.gradient_checkpointing else "without"
    why = f": {forecast.gradient_checkpointing_why}" if configured == "auto" else ""
    message = (
        f"peak {at_most}{_size(prediction.peak)} a process in the {prediction.phase} phase{near}: {parts}"
        f" ({precision}, {checkpointing} gradient checkpointing{why})"
    )
    fields = {
        "peak": prediction.peak,
        "by_category": dict(prediction.by_category),
        "by_phase": dict(prediction.by_phase),
        "phase": prediction.phase,
        "place": prediction.place,
        "is_bound": prediction.is_bound,
        "copy": prediction.copy,
        "precision": forecast.precision,
        "gradient_checkpointing": forecast.gradient_checkpointing,
    }
    if (budget := preflight.config.training.activation_memory_budget) is not None:
        message += f"; this is without activation_memory_budget {budget:g}, whose effect is not predicted"
    sharded = preflight.config.training.parallel == "fsdp" and preflight.options.world_size > 1
    if sharded:
        message += "; this is a process that has the whole model: what fsdp saves is not predicted"
    if prediction.copy:
        message += f"; background_save holds a copy of {_size(prediction.copy)} in host memory"
    yield Finding("info", "memory", message, fields=fields)
    if (gpu := forecast.gpu) is None:
        return
    margin = gpu.usable - prediction.peak
    fields = {"memory": gpu.memory, "usable": gpu.usable, "margin": margin}
    if margin < 0:
        kept = f"{_size(gpu.memory - gpu.usable)} of its {_size(gpu.memory)} are kept for CUDA and no tensors"
        if gpu.usable == gpu.free:
            kept = f"other processes and CUDA use the rest of its {_size(gpu.memory)}"
        message = f"the run needs {_size(-margin)} more than {gpu.name} has for tensors ({_size(gpu.usable)}; {kept})"
        hint = "lower per_device_batch_size (--fit finds it), or shorten data.max_length"
        if budget:
            hint = f"lower activation_memory_budget, {hint}"
        elif not forecast.gradient_checkpointing and budget is None:
            hint = f"set gradient_checkpointing to true, {hint}"
        key = "training.per_device_batch_size"
        yield Finding("warning" if sharded else "error", "memory-too-small", message, key, hint, fields=fields)
    else:
        message = f"{gpu.name} has {_size(gpu.usable)} for tensors: a margin of {_size(margin)}"
        yield Finding("info", "memory-margin", message, fields=fields)
    if forecast.batch is not None:
        bare = forecast.batch_without_checkpointing
        most = forecast.largest_tried
        at_least = {number: "at least " if number == most else "" for number in (forecast.batch, bare)}
        message = f"the largest per_device_batch_size for {gpu.name} is {at_least[forecast.batch]}{forecast.batch}"
        if not forecast.batch:
            message = f"not even one row fits into the {_size(gpu.usable)} that {gpu.name} has for tensors"
        elif configured and not bare:
            message += "; without gradient checkpointing not even one row fits"
        elif configured:
            message += f", and {at_least[bare]}{bare} without gradient checkpointing, which saves a forward pass"
            message += ' ("auto" switches it off up to there)' if configured == "auto" else ""
        fields = {"batch": forecast.batch, "batch_without_checkpointing": bare}
        yield Finding("info", "memory-fit", message, fields=fields)


def _size(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"
