"""The weights that the step loop trains, and what happens at its boundaries."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_simple import Plugin, PluginError, hookimpl
from gpt_simple.engine import gradients
from gpt_simple.hooks import GradientsReady, StepEnd
from gpt_simple.run_dir.lineage import read_metrics
from tests.checkpoint.optimizers import SAVED, UNSAVABLE
from tests.children import Everywhere, stops_at
from tests.tiny import TinyRun, state_bytes, weights

STAGES: dict[str, Any] = {
    "training__warmup_stages": [
        {"steps": 2, "gradient_accumulation_steps": 1, "length": 8},
        {"steps": 2, "length": 16},
        {"steps": 2, "gradient_accumulation_steps": 3},
    ],
    "training__max_steps": 8,
    "training__logging_steps": 1,
}
"""The tiny run with 2 x 1, 2 x 2, 2 x 3 and then 2 x 2 samples of 32 tokens in a step."""

TOKENS = [64, 64, 128, 128, 192, 192, 128, 128]
"""Of each step."""


class DrawsRandomNumbers(Everywhere):
    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        torch.rand(3)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        torch.manual_seed(event.step)


def test_an_interrupted_run_equals_a_whole_one_bit_for_bit(tiny: TinyRun) -> None:
    options: dict[str, Any] = {"model__dropout": 0.1, "training__eval_steps": 3, "data__num_workers": 2}
    options["training__logging_steps"] = 1
    whole = tiny("whole", **options)
    for stop in (2, 5):
        part = tiny("parts", plugins=[stops_at(stop)], **options)
        assert (part.status, part.steps, part.exit_code) == ("stopped", stop, 75)
    rest = tiny("parts", **options)
    assert (rest.status, rest.steps, rest.exit_code) == ("completed", 6, 0)
    assert state_bytes(rest) == state_bytes(whole)
    assert rest.final_loss == whole.final_loss
    assert rest.final_val_loss == whole.final_val_loss
    assert rest.total_tokens == whole.total_tokens == 6 * 2 * 2 * 32


class Batches(Everywhere):
    """The first sample, shape and number of targets of each micro-batch, by step."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: dict[int, list[tuple[int, list[int], int]]] = {}

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        batch = event.batch
        self.seen.setdefault(event.step, []).append((batch.first_sample, list(batch.input_ids.shape), batch.targets))


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_stopped_in_each_stage_equals_a_whole_one(tiny: TinyRun, masked: bool) -> None:
    options = {**STAGES, "model__dropout": 0.1, "data__document_mask": masked, "data__num_workers": 2}
    whole = Batches()
    expected, parts = tiny("whole", plugins=[whole], **options), {}
    for stop in (1, 2, 3, 5, 7, 8):
        batches = Batches()
        result = tiny("parts", plugins=[stops_at(stop), batches] if stop < 8 else [batches], **options)
        assert result.steps == stop
        assert not parts.keys() & batches.seen.keys()
        parts |= batches.seen
    assert parts == whole.seen
    assert state_bytes(result) == state_bytes(expected)
    assert result.total_tokens == expected.total_tokens == sum(TOKENS)
    assert [len(batches) for batches in whole.seen.values()] == [1, 1, 2, 2, 3, 3, 2, 2]
    assert [batches[0][1] for batches in whole.seen.values()] == [*[[8, 8]] * 2, *[[4, 16]] * 2, *[[2, 32]] * 4]
    samples = [first for batches in whole.seen.values() for first, _, _ in batches]
    assert samples == list(range(0, 2 * len(samples), 2))
    rows = read_metrics(expected.output_dir / "metrics.jsonl", "train")
    assert [row["tokens"] for row in rows] == [sum(TOKENS[: step + 1]) for step in range(8)]


def test_a_run_with_stages_equals_a_bare_loop(tiny: TinyRun) -> None:
    """Each step is the mean over all targets of its micro-batches, of the samples cut into rows."""
    options = {**STAGES, "optimizer__schedule": "constant", "optimizer__warmup_steps": 0}
    kept: dict[int, list[Any]] = {}
    built: list[torch.nn.Module] = []

    class Keeps(Everywhere):
        @hookimpl
        def on_model_built(self, run: Any, event: Any) -> None:
            built.append(copy.deepcopy(event.model))

        @hookimpl
        def on_batch(self, run: Any, event: Any) -> None:
            kept.setdefault(event.step, []).append(event.batch)

    trained = weights(tiny(plugins=[Keeps(None)], **options))
    model = built[0].train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for batches in kept.values():
        targets = sum(batch.targets for batch in batches)
        for batch in batches:
            (model(batch.input_ids, batch.labels) / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.data, rtol=1e-4, atol=1e-6)


def test_the_time_left_counts_the_tokens_of_the_stages(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tokens of the steps so far."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("gpt_simple.run_dir.status.StatusFile.update", lambda self, **changes: seen.append(changes))
    tiny(**STAGES)
    left = {row["step"]: row["eta_seconds"] * row["tokens_per_second"] for row in seen if row.get("tokens_per_second")}
    assert left == {step: pytest.approx(sum(TOKENS[step:])) for step in range(2, 9)}


def test_the_facts_name_the_stages_of_the_run(tiny: TinyRun) -> None:
    facts: list[Any] = []

    class Asks(Everywhere):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            facts.append(run.facts())

    tiny("one", plugins=[Asks(None)], training__max_steps=1)
    tiny("stages", plugins=[Asks(None)], **{**STAGES, "training__max_steps": 4})
    one = {"first_step": 1, "accumulation": 2, "rows": 2, "length": 32, "samples": 4, "tokens": 128}
    first = {"first_step": 1, "accumulation": 1, "rows": 8, "length": 8, "samples": 2, "tokens": 64}
    second = {"first_step": 3, "accumulation": 2, "rows": 4, "length": 16, "samples": 4, "tokens": 128}
    assert [found["stages"] for found in facts] == [[one], [first, second]]
    assert [found["tokens_per_step"] for found in facts] == [128, 128]


def test_data_that_end_in_a_stage_end_the_run(tiny: TinyRun) -> None:
    options = {**STAGES, "data__on_exhaustion": "halt", "training__max_steps": 10**4}
    whole = tiny("whole", **options)
    assert whole.status == "completed"
    tiny("parts", plugins=[stops_at(3)], **options)
    assert state_bytes(tiny("parts", **options)) == state_bytes(whole)


def test_a_changed_plan_goes_on_at_the_same_sample(tiny: TinyRun) -> None:
    before, after = Batches(), Batches()
    tiny(plugins=[stops_at(3), before], **STAGES)
    changed = [{"steps": 5, "gradient_accumulation_steps": 4, "length": 4}]
    lines = tiny(plugins=[after], **{**STAGES, "training__warmup_stages": changed}).output_dir / "run.json"
    assert after.seen[4][0] == (before.seen[3][-1][0] + 2, [16, 4], 64)
    assert [len(batches) for batches in after.seen.values()] == [4, 4, 2, 2, 2]
    assert "changed: training.warmup_stages [{" in lines.read_text()


def test_evaluation_and_random_numbers_do_not_change_training(tiny: TinyRun) -> None:
    plain = tiny("plain", model__dropout=0.1)
    busy = tiny("busy", model__dropout=0.1, training__eval_steps=1, plugins=[DrawsRandomNumbers(None)])
    assert state_bytes(plain) == state_bytes(busy)


def test_dropout_and_order_follow_the_seed(tiny: TinyRun) -> None:
    one, other = tiny("one", model__dropout=0.1), tiny("other", model__dropout=0.1, training__seed=43)
    assert state_bytes(one) != state_bytes(other)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny: TinyRun) -> None:
    sizes = {"training__per_device_batch_size": 4, "training__gradient_accumulation_steps": 1}
    halves, whole = tiny("halves"), tiny("whole", **sizes)
    assert halves.final_loss == pytest.approx(whole.final_loss, rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(halves)[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_equals_a_bare_pytorch_loop(tiny: TinyRun) -> None:
    """Same rows, clipping, fused AdamW and schedule; gradients here are five to ten times the limit."""

    class Bare(Everywhere):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            self.model = copy.deepcopy(run.model)
            matrices = [p for p in self.model.parameters() if p.dim() >= 2]
            vectors = [p for p in self.model.parameters() if p.dim() < 2]
            groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
            self.norms: list[float] = []

        @hookimpl
        def on_batch(self, run: Any, event: Any) -> None:
            batch = event.batch
            (self.model(batch.input_ids, batch.labels) / batch.targets / 2).backward()
            if event.micro_batch == 1:
                self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5).item())
                self.optimizer.step()
                self.optimizer.zero_grad()

    bare = Bare(None)
    flat = {"optimizer__schedule": "constant", "optimizer__warmup_steps": 0, "optimizer__max_grad_norm": 0.5}
    result = tiny(plugins=[bare], **flat)
    assert min(bare.norms) > 1.0
    for name, tensor in bare.model.state_dict().items():
        torch.testing.assert_close(weights(result)[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_loss_is_weighted_by_tokens_and_not_by_micro_batches(tiny: TinyRun) -> None:
    """With best-fit packing rows end in padding, so micro-batches have unequal numbers of targets."""
    sizes = {"training__per_device_batch_size": 4, "training__gradient_accumulation_steps": 1}
    options: dict[str, Any] = {"data__packing": "best_fit", "data__max_length": 700, "model__n_layer": 1}

    class Counts(Everywhere):
        targets: list[int] = []

        @hookimpl
        def on_batch(self, run: Any, event: Any) -> None:
            self.targets.append(event.batch.targets)

    counts = Counts(None)
    halves, whole = tiny("halves", plugins=[counts], **options), tiny("whole", **sizes, **options)
    assert len(set(counts.targets)) > 1
    assert halves.final_loss == pytest.approx(whole.final_loss, rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(halves)[name], tensor, rtol=1e-3, atol=1e-5)


class CountsForwards(Everywhere):
    """How often each block computes its activations."""

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.calls = [0] * len(run.model.blocks)
        for index, block in enumerate(run.model.blocks):
            block.register_forward_pre_hook(partial(self._count, index))

    def _count(self, index: int, *_: Any) -> None:
        self.calls[index] += 1


@pytest.mark.parametrize(("every", "calls"), [(True, [24, 24]), (2, [24, 12])])
def test_gradient_checkpointing_gives_the_same_weights(tiny: TinyRun, every: bool | int, calls: list[int]) -> None:
    """Six steps of two micro-batches; a block that is checkpointed computes its activations twice."""
    once, again = CountsForwards(None), CountsForwards(None)
    plain = tiny("plain", model__dropout=0.1, plugins=[once])
    checkpointed = tiny("checkpointed", model__dropout=0.1, training__gradient_checkpointing=every, plugins=[again])
    assert (once.calls, again.calls) == ([12, 12], calls)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_compilation_gives_the_same_loss_and_clean_names(tiny: TinyRun, scope: str) -> None:
    eager = tiny("eager", training__eval_steps=3)
    compiled = tiny(
        "compiled",
        training__compile=True,
        training__compile_scope=scope,
        training__compile_backend="aot_eager",
        training__gradient_checkpointing=True,
        training__eval_steps=3,
    )
    assert compiled.final_val_loss == pytest.approx(eager.final_val_loss, rel=1e-4)
    assert weights(compiled).keys() == weights(eager).keys()
    assert "sample" in compiled.summary["plugins"]["sample"]


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False)])
def test_a_resume_with_another_compilation_is_logged(tiny: TinyRun, first: bool, then: bool) -> None:
    options: dict[str, Any] = {"training__compile_backend": "aot_eager", "training__compile_scope": "model"}
    tiny(plugins=[stops_at(2)], training__compile=first, **options)
    rest = tiny(training__compile=then, **options)
    rows = read_metrics(rest.output_dir / "metrics.jsonl")
    (message,) = [row["message"] for row in rows if row.get("name") == "run_start" and row["step"] == 2]
    names = {False: "off", True: "model/aot_eager"}
    assert message.endswith(f"; compile {names[first]} -> {names[then]}")


def test_bf16_trains_on_a_cpu_with_fp32_weights(tiny: TinyRun) -> None:
    result = tiny(training__mixed_precision="bf16")
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.float32}
    assert result.final_loss == pytest.approx(tiny("fp32").final_loss, rel=0.05)


class SpoilsGradient(Everywhere):
    """One element of one gradient becomes NaN (or a flag asks for a skip) at one step."""

    def __init__(self, step: int, by_flag: bool = False) -> None:
        super().__init__(None)
        self.step, self.by_flag = step, by_flag
        self.before: dict[str, torch.Tensor] = {}
        self.unchanged: bool | None = None

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        if event.step != self.step:
            return
        self.before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        if self.by_flag:
            run.control.skip_step(torch.tensor(True))
        else:
            next(run.model.parameters()).grad.view(-1)[0] = float("nan")

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == self.step:
            self.unchanged = all(torch.equal(p, self.before[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("by_flag", [False, True])
def test_a_non_finite_step_is_skipped_and_counted(tiny: TinyRun, by_flag: bool) -> None:
    plugin = SpoilsGradient(3, by_flag)
    result = tiny(plugins=[plugin])
    assert plugin.unchanged is True
    assert result.steps == 6, "a skipped step still advances step, schedule and data"
    assert all(torch.isfinite(tensor).all() for tensor in weights(result).values())
    rows = read_metrics(result.output_dir / "metrics.jsonl")
    assert [row.get("train/skipped_steps") for row in rows if row["kind"] == "train"] == [None, 1.0, None]


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a device tensor was read on the host between logging points")
        return func(*args, **(kwargs or {}))


class ForbidsHostReads(Everywhere):
    """From the first step to the last but one; ``.tolist`` and ``.numpy`` pass the dispatcher and are patched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until: int) -> None:
        super().__init__(None)
        self.until, self.patch, self.mode, self.steps = until, monkeypatch, _NoHostReads(), 0

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        if event.step == 2:
            self.mode.__enter__()
            for name in ("tolist", "numpy"):
                self.patch.setattr(torch.Tensor, name, _forbidden)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.steps += event.step >= 2
        if event.step == self.until:
            self.mode.__exit__(None, None, None)
            self.patch.undo()


def _forbidden(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a device tensor was read on the host between logging points")


def test_nothing_is_read_on_the_host_between_logging_points(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, data_cache: Path
) -> None:
    with monkeypatch.context() as patch:
        guard = ForbidsHostReads(patch, until=7)
        tiny(plugins=[guard], training__logging_steps=100, training__max_steps=8, data__num_workers=0)
    assert guard.steps == 7


def test_the_guard_against_host_reads_catches_one(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(Everywhere):
        @hookimpl
        def on_batch(self, run: Any, event: Any) -> None:
            if event.step == 3:
                next(run.model.parameters()).sum().item()

    with monkeypatch.context() as patch:
        guard = ForbidsHostReads(patch, until=7)
        try:
            with pytest.raises(Exception, match="read on the host"):
                tiny(plugins=[guard, Reads(None)], training__logging_steps=100, training__max_steps=8)
        finally:
            guard.mode.__exit__(None, None, None)


def test_an_early_end_of_the_data_is_announced(tiny: TinyRun) -> None:
    seen: list[str] = []

    class Records(Everywhere):
        @hookimpl
        def on_log(self, run: Any, event: Any) -> None:
            seen.append(f"{run.step} {event.name} {event.message}")

        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            seen.append("evaluation")

    short = {"data__max_documents": 12, "data__val_fraction": 0, "training__eval_steps": 0}
    result = tiny(plugins=[Records(None)], data__on_exhaustion="halt", training__max_steps=1000, **short)
    early = [line for line in seen if "data_end_early" in line]
    assert len(early) == 1
    assert early[0].startswith(
        f"0 data_end_early the data end after step {result.steps} of 1,000, and the run with them"
    )
    assert "evaluation" not in seen
    assert result.status == "completed"
    assert result.summary["next"] == "train(...) with data.on_exhaustion repeat goes on from here"
    more = tiny(training__max_steps=result.steps + 2, **short)
    assert more.steps == result.steps + 2
    assert more.summary["next"].startswith("train(...) with training.max_steps")


def test_order_of_the_boundary(tiny: TinyRun) -> None:
    """Metrics, then checkpoint, then evaluation; a stop writes the checkpoint and skips the evaluation."""

    seen: list[str] = []

    class Records(Everywhere):
        @hookimpl
        def on_metrics(self, run: Any, event: Any) -> None:
            seen.append("metrics")

        @hookimpl
        def on_checkpoint_saved(self, run: Any, event: Any) -> None:
            seen.append("checkpoint")

        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            seen.append("evaluation")

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            seen.append(f"step {event.step}")
            if event.step == 4:
                run.control.stop("enough")

    tiny(plugins=[Records(None)], training__eval_steps=2, training__save_steps=2)
    assert seen == [
        "step 1",
        "step 2",
        "metrics",
        "checkpoint",
        "evaluation",
        "step 3",
        "step 4",
        "metrics",
        "checkpoint",
    ]


def brings(optimizer: type[torch.optim.Optimizer]) -> type[Plugin[Any]]:
    class Brings(Everywhere):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Any) -> None:
            registry.add("optimizer", "foreign", lambda model, config, device: optimizer(model.parameters()))

    return Brings


@pytest.mark.parametrize("kind", SAVED)
def test_a_foreign_optimizer_resumes_bit_for_bit(tiny: TinyRun, kind: type[torch.optim.Optimizer]) -> None:
    options: dict[str, Any] = {"optimizer__name": "foreign", "training__gradient_accumulation_steps": 1}
    whole = tiny("whole", plugins=[brings(kind)], **options)
    tiny("parts", plugins=[brings(kind), stops_at(3)], **options)
    rest = tiny("parts", plugins=[brings(kind)], **options)
    assert state_bytes(rest) == state_bytes(whole)


class OwnParameters(torch.optim.SGD):
    """Holds a copy of the model, so nothing would be trained."""

    def __init__(self, parameters: Any) -> None:
        super().__init__([torch.nn.Parameter(each.detach().clone()) for each in parameters])


@pytest.mark.parametrize("what", [*UNSAVABLE, "parameters of another model"])
def test_unsavable_optimizer_state_ends_the_first_step(tiny: TinyRun, what: str, tmp_path: Path) -> None:
    plugin = brings(UNSAVABLE.get(what, OwnParameters))
    steps = Counts(None)
    with pytest.raises(PluginError, match=r"optimizer 'foreign' of the plugin") as refused:
        tiny(plugins=[plugin, steps], optimizer__name="foreign", training__max_steps=300)
    assert refused.value.exit_code == 5
    assert steps.ended == 0
    assert not list((tmp_path / "run/checkpoints").glob("*"))


class Counts(Everywhere):
    ended = 0

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.ended += 1


class EditsBatch(Everywhere):
    def __init__(self, name: str, edit: Any) -> None:
        super().__init__(None)
        self.name, self.edit = name, edit

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        self.edit(getattr(event.batch, self.name))


class LaterEditsBatch(EditsBatch):
    on_error = "disable"


IN_PLACE = {
    "fill_": lambda tensor: tensor.fill_(3),
    "index": lambda tensor: tensor.__setitem__((0, 0), 3),
    "view": lambda tensor: tensor.view(-1)[5:9].zero_(),
    "detach": lambda tensor: tensor.detach().add_(1),
}
HIDDEN = {"data": lambda tensor: tensor.data.fill_(3), "numpy": lambda tensor: tensor.numpy().fill(3)}
"""Edits that torch does not count. They must have no effect either."""

FIELDS = ["input_ids", "labels", "position_ids", "document_ids"]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("edit", IN_PLACE)
def test_an_edit_of_a_batch_is_refused(tiny: TinyRun, name: str, edit: str) -> None:
    with pytest.raises(PluginError, match=r"plugin editsbatch .*on_batch at step 1: .*edited event\.batch"):
        tiny(plugins=[EditsBatch(name, IN_PLACE[edit])], data__document_mask=True, training__max_steps=2)


@pytest.mark.parametrize("edit", [*IN_PLACE, *HIDDEN])
def test_an_edit_of_a_batch_changes_no_training(tiny: TinyRun, edit: str) -> None:
    options = {"data__document_mask": True, "training__max_steps": 2}
    plain = tiny("plain", **options)
    plugins = [LaterEditsBatch(name, (IN_PLACE | HIDDEN)[edit]) for name in ("labels",)]
    assert state_bytes(tiny("edited", plugins=plugins, **options)) == state_bytes(plain)


class Changes(Everywhere):
    """Freezes the embedding before training. Changes the model in ``hook``."""

    def __init__(self, hook: str, change: Any) -> None:
        super().__init__(None)
        self.hook, self.change = hook, change

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        event.model.token_embedding.weight.requires_grad_(False)

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        if self.hook == "on_run_start":
            self.change(run.model)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if self.hook == "on_step_end" and event.step == 3:
            self.change(run.model)


def _unfreeze(model: Any) -> None:
    model.token_embedding.weight.requires_grad_(True)


def _replace(model: Any) -> None:
    model.blocks[0] = copy.deepcopy(model.blocks[0])


def _add(model: Any) -> None:
    model.register_parameter("another", torch.nn.Parameter(torch.zeros(2)))


def _remove(model: Any) -> None:
    del model.blocks[1]


CHANGES = {
    "unfreezes": (_unfreeze, r"token_embedding\.weight requires gradients now, and is not trained"),
    "replaces": (_replace, r"blocks\.0\.\S+ requires gradients now, and is not trained"),
    "adds": (_add, r"another requires gradients now, and is not trained"),
    "removes": (_remove, r"\d parameters that are trained are no longer in the model"),
}


@pytest.mark.parametrize("hook", ["on_run_start", "on_step_end"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_change_of_what_is_trained_is_refused(tiny: TinyRun, hook: str, how: str) -> None:
    change, message = CHANGES[how]
    with pytest.raises(PluginError, match=message) as refused:
        tiny(plugins=[Changes(hook, change)])
    assert refused.value.exit_code == 5
    assert "in on_model_built" in str(refused.value)


def test_a_freeze_is_allowed_before_training_and_later(tiny: TinyRun) -> None:
    def freeze(model: Any) -> None:
        model.blocks[0].requires_grad_(False)

    assert tiny(plugins=[Changes("on_step_end", freeze)]).status == "completed"


_HIDDEN = "grad_norm"


class Halves(Everywhere):
    """Edits every gradient, before the plugins whose names come later."""

    def __init__(self) -> None:
        super().__init__(None)
        self.norms: list[torch.Tensor] = []

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]))
        for parameter in run.model.parameters():
            parameter.grad.mul_(0.5)


class Reads(Everywhere):
    """Keeps the facts of the steps."""

    def __init__(self) -> None:
        super().__init__(None)
        self.gradients: list[tuple[torch.Tensor, float, torch.Tensor]] = []
        self.ends: list[tuple[torch.Tensor, float, torch.Tensor, torch.Tensor, Any]] = []

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        self.gradients.append((event.loss, event.learning_rate, event.grad_norm))

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.ends.append((event.loss, event.learning_rate, event.grad_norm, event.skipped, event.skipped_by))


@pytest.mark.parametrize("order", ["edited before", "edited after", "not edited"])
def test_the_facts_of_a_step(tiny: TinyRun, order: str) -> None:
    place = {"before": ("reads",)} if order == "edited before" else {"after": ("reads",)}
    edits, reads = type("Halves", (Halves,), place)(), Reads()
    result = tiny(plugins=[reads] if order == "not edited" else [edits, reads], training__logging_steps=1)
    rows = [row for row in read_metrics(result.output_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == len(reads.gradients) == len(reads.ends) == 6
    factor = 1.0 if order == "not edited" else 0.5
    for row, before, after in zip(rows, reads.gradients, reads.ends, strict=True):
        assert before[:2] == after[:2] == (pytest.approx(row["train/loss"]), row["train/lr"])
        assert float(after[2]) == pytest.approx(row["train/grad_norm"])
        assert float(before[2]) == pytest.approx(row["train/grad_norm"] / factor)
        assert after[3].dtype is torch.bool
        assert not after[3]
        assert [name for name, flag in after[4].items() if flag] == []
    if order != "not edited":
        assert [float(norm) for _, _, norm in reads.gradients] == [float(norm) for norm in edits.norms]


def test_a_norm_that_cannot_be_foreseen_is_a_failure(tiny: TinyRun) -> None:
    class Hides(Everywhere):
        after = ("halves",)

        @hookimpl
        def on_gradients(self, run: Any, event: Any) -> None:
            getattr(event, _HIDDEN)

    with pytest.raises(PluginError, match=r"plugin hides .* failed in on_gradients at step 1: event.grad_norm is"):
        tiny(plugins=[Halves(), Hides(None)])


@pytest.mark.parametrize("readers", [0, 1, 2])
def test_the_norm_is_made_once_if_anybody_asks(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, readers: int) -> None:
    made: list[int] = []
    real = gradients.total_norm
    monkeypatch.setattr(gradients, "total_norm", lambda held: made.append(1) or real(held))
    classes = [Reads, type("AlsoReads", (Reads,), {})][:readers]
    tiny(plugins=[Halves(), *(cls() for cls in classes)])
    assert len(made) == (6 if readers else 0)


def test_an_event_of_an_earlier_version_can_be_made() -> None:
    assert dict(StepEnd(3, 30, 29, True).skipped_by) == {}
    assert GradientsReady(3) == GradientsReady(3, loss=torch.ones(()))
    event = GradientsReady(3, loss=torch.ones(()), learning_rate=0.1, grad_norm=lambda: torch.zeros(()))
    assert (float(event.loss), event.learning_rate, float(event.grad_norm)) == (1.0, 0.1, 0.0)
