"""Predicts the peak of memory before the run, and compares it with the first real steps.

``gpt-simple validate --memory`` asks for the prediction alone. In a run (``-p memory``) the first two steps are
measured: what the allocator of a GPU reports, or on a CPU the allocations that torch's profiler sees. The error is
logged once, and goes into the summary.
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
"""The first step makes the optimizer's state; the second has all of it from its start."""


class Memory(Plugin[NoConfig]):
    """Runs on the main process: the others need as much."""

    after = ("validate",)

    _preflight: Preflight
    _prediction: MemoryPrediction
    _predicted = 0
    _measured: int | None = None
    _profiling = False
    _resident = 0
    _until = 0

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
        facts = run.facts()
        self._prediction = self._preflight.predict_memory(
            vocab_size=run.tokenizer.vocab_size,
            precision=facts["precision"],
            compiled=facts["compile"] != "off",
            world_size=run.world_size,
            cuda=run.device.type == "cuda",
        )
        self._until = event.step + _MEASURED_STEPS
        self._predicted = self._prediction.training_peak
        every = run.config.training.save_steps
        if run.device.type == "cpu" and every and (event.step + 1) % every == 0:
            self._predicted += self._prediction.copy  # the second of the steps finds what the first one's save took
        if run.device.type == "cpu":
            self._start_counting(run, resumed=event.resumed_from is not None)

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        if self._measured is not None or not (event.step == self._until or event.is_last):
            return
        if self._profiling:
            self._profiling = False
            self._measured = self._resident + stop_counting()
        else:
            self._measured = run.peak_memory()
        predicted = self._predicted
        run.log.info(
            f"memory of {_MEASURED_STEPS} steps: predicted {self._at_most}{predicted / _MIB:,.1f} MiB, measured"
            f" {self._measured / _MIB:,.1f} MiB ({self._error:+.1%})",
            name="memory",
            predicted=predicted,
            measured=self._measured,
            error=self._error,
        )

    @hookimpl
    def on_close(self, run: Run, event: ev.Close) -> None:
        if self._profiling:
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
    def _at_most(self) -> str:
        return "at most " if self._prediction.is_bound else ""

    @property
    def _error(self) -> float:
        assert self._measured is not None
        return self._predicted / self._measured - 1

    def _start_counting(self, run: Run, *, resumed: bool) -> None:
        """Count from here on, on top of the tensors that are there already."""
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*run.model.parameters(), *run.model.buffers())}
        self._resident = sum(held.values())
        if resumed:
            self._resident += self._prediction.by_category["optimizer"]
        gc.collect()  # what lies about from before must not be freed meanwhile: it would be taken off
        start_counting()
        self._profiling = True


def start_counting() -> None:
    """Have torch record every allocation on the CPU in this thread. Its newer profiler would print on stderr."""
    import torch
    from torch._C._profiler import _ExperimentalConfig

    recorder: Any = torch.autograd  # what it exports of the profiler is not in its types
    with_memory = (False, True, False, False, False)  # shapes, memory, stack, FLOPs, modules
    recorder._enable_profiler_legacy(
        recorder.ProfilerConfig(recorder.ProfilerState.CPU, *with_memory, _ExperimentalConfig())
    )


def stop_counting() -> int:
    """The most bytes that were allocated at a time since ``start_counting``, beyond those that were there before."""
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
    forecast, training = preflight.memory, preflight.config.training
    prediction = forecast.prediction
    parts = ", ".join(f"{name} {_size(size)}" for name, size in prediction.by_category.items() if size > _SHOWN)
    place = f" near {prediction.place}" if prediction.place else ""
    at_most = "at most " if prediction.is_bound else ""
    checkpointing = "with" if training.gradient_checkpointing else "without"
    message = (
        f"peak {at_most}{_size(prediction.peak)} a process in the {prediction.phase} phase{place}: {parts}"
        f" ({'fp32' if forecast.precision == 'no' else forecast.precision}, {checkpointing} gradient checkpointing)"
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
    }
    if prediction.copy:
        message += f"; background_save holds a copy of {_size(prediction.copy)} in host memory"
    yield Finding("info", "memory", message, fields=fields)
    gpu = forecast.gpu
    if gpu is None:
        return
    margin = gpu.usable - prediction.peak
    fields = {"memory": gpu.memory, "usable": gpu.usable, "margin": margin}
    if margin < 0:
        kept = f"{_size(gpu.memory - gpu.usable)} of its {_size(gpu.memory)} are kept for CUDA and no tensors"
        message = f"the run needs {_size(-margin)} more than {gpu.name} has for tensors ({_size(gpu.usable)}; {kept})"
        hint = "lower per_device_batch_size (--fit finds it), or shorten data.max_length"
        if not training.gradient_checkpointing:
            hint = f"set gradient_checkpointing to true, {hint}"
        yield Finding("error", "memory-too-small", message, "training.per_device_batch_size", hint, fields=fields)
    else:
        message = f"{gpu.name} has {_size(gpu.usable)} for tensors: a margin of {_size(margin)}"
        yield Finding("info", "memory-margin", message, fields=fields)
    if forecast.batch is not None:
        bare = forecast.batch_without_checkpointing
        most = forecast.largest_tried
        at_least = {number: "at least " if number == most else "" for number in (forecast.batch, bare)}
        message = f"the largest per_device_batch_size for {gpu.name} is {at_least[forecast.batch]}{forecast.batch}"
        if training.gradient_checkpointing:
            message += f", and {at_least[bare]}{bare} without gradient checkpointing, which saves a forward pass"
        fields = {"batch": forecast.batch, "batch_without_checkpointing": bare}
        yield Finding("info", "memory-fit", message, fields=fields)


def _size(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"
