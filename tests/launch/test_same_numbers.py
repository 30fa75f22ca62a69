"""What a run learns does not depend on how many processes it has, nor on where it was interrupted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import Metric, hookimpl
from gpt_simple.checkpoint.store import Store
from gpt_simple.config.schema import ModelConfig, TrainingConfig
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.casts import WeightCasts
from gpt_simple.engine.compile import compile_flags, compile_model, plan
from gpt_simple.model.gpt import build
from gpt_simple.run_dir.lineage import read_metrics
from tests.children import At, Everywhere, kill_self
from tests.launch.conftest import Ranks, tiny


def stops_at(step: int) -> At:
    """One process asks for a stop, the last one."""
    return At("on_step_end", step, lambda run: run.control.stop("enough") if run.rank == run.world_size - 1 else None)


def files(directory: Path, step: int) -> str:
    """A hash of weights and optimizer state in a checkpoint."""
    checkpoint = directory / f"checkpoints/step-{step:08d}"
    parts = [(checkpoint / f"{stem}.safetensors").read_bytes() for stem in ("model", "optimizer")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def losses(directory: Path) -> list[float]:
    rows = read_metrics(directory / "metrics.jsonl")
    return [row[key] for row in rows for key in ("train/loss", "eval/loss") if key in row]


def test_the_same_global_batch_gives_the_same_losses(ranks: Ranks, tmp_path: Path) -> None:
    """Also where micro-batches have unequal numbers of targets, and in evaluations that do not divide evenly."""
    for count, (batch, accumulation) in {1: (2, 4), 2: (2, 2), 4: (1, 2)}.items():

        def work(rank: int, n: int = count, b: int = batch, a: int = accumulation) -> int:
            return tiny(
                tmp_path / str(n),
                training__per_device_batch_size=b,
                training__gradient_accumulation_steps=a,
                training__logging_steps=1,
                training__eval_steps=3,
                training__max_eval_batches=None,
                data__packing="best_fit",
                data__max_length=64,
                data__max_documents=60,
            ).total_target_tokens

        assert len(set(ranks(count, work))) == 1
    one = losses(tmp_path / "1")
    assert len(one) == 8
    assert losses(tmp_path / "2") == pytest.approx(one, rel=1e-6)
    assert losses(tmp_path / "4") == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_an_interrupted_run_equals_an_uninterrupted_one(ranks: Ranks, tmp_path: Path, count: int) -> None:
    """Bit for bit."""
    options: dict[str, Any] = {"model__dropout": 0.1, "training__per_device_batch_size": 1, "model__n_layer": 3}
    ranks(count, lambda rank: tiny(tmp_path / "whole", **options).status)
    stopped = ranks(count, lambda rank: tiny(tmp_path / "parts", plugins=[stops_at(2)], **options).reason)
    assert stopped == ["enough"] * count, "all processes get the reason of the one that asked"
    assert ranks(count, lambda rank: tiny(tmp_path / "parts", **options).status) == ["completed"] * count
    assert files(tmp_path / "parts", 6) == files(tmp_path / "whole", 6)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


class Samples(Everywhere):
    """The samples that this process trained on, by their number in the order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        first, batch = event.batch.first_sample, event.batch.input_ids
        self.seen += range(first, first + batch.numel() // run.config.data.max_length)


def test_another_number_of_processes_sees_every_sample_once(ranks: Ranks, tmp_path: Path) -> None:
    seen: list[int] = []
    for count, steps in ((4, 2), (1, 3), (3, 4), (2, 5)):

        def work(rank: int, steps: int = steps) -> list[int]:
            samples = Samples()
            tiny(tmp_path / "run", plugins=[samples], training__max_steps=steps)
            return samples.seen

        for samples in ranks(count, work):
            seen += samples
    # 2 rows and 2 micro-batches for each process and step.
    assert sorted(seen) == list(range((4 * 2 + 1 + 3 + 2) * 4))


STAGES: dict[str, Any] = {
    "training__warmup_stages": [
        {"steps": 2, "gradient_accumulation_steps": 1, "length": 8},
        {"steps": 3, "length": 16},
        {"steps": 2, "gradient_accumulation_steps": 3},
    ],
    "data__document_mask": True,
}


def test_stages_and_other_processes_see_every_sample_once(ranks: Ranks, tmp_path: Path) -> None:
    """Stopped inside each stage."""
    seen: list[int] = []
    for count, steps in ((2, 1), (1, 3), (2, 6), (1, 8), (2, 9)):

        def work(rank: int, steps: int = steps) -> list[int]:
            samples = Samples()
            tiny(tmp_path / "run", plugins=[samples], training__max_steps=steps, **STAGES)
            return samples.seen

        for samples in ranks(count, work):
            seen += samples
    # 2 samples in a micro-batch of each process: 1, 2, 3 and then 2 micro-batches.
    assert sorted(seen) == list(range(2 * (2 * 1 + 1 * 1 + 1 * 2 + 2 * 2 + 2 * 2 + 2 * 3 + 1 * 3 + 1 * 2 + 2 * 2)))


def test_a_run_stopped_in_each_stage_equals_a_whole_one(ranks: Ranks, tmp_path: Path) -> None:
    """Bit for bit, on two processes."""
    options = {"model__dropout": 0.1, "training__max_steps": 9, "training__logging_steps": 1, **STAGES}
    ranks(2, lambda rank: tiny(tmp_path / "whole", **options).status)
    for stop in (1, 4, 6, 8):
        ended = ranks(2, lambda rank, stop=stop: tiny(tmp_path / "parts", plugins=[stops_at(stop)], **options).steps)
        assert ended == [stop] * 2
    assert ranks(2, lambda rank: tiny(tmp_path / "parts", **options).status) == ["completed"] * 2
    assert files(tmp_path / "parts", 9) == files(tmp_path / "whole", 9)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_killed_in_each_stage_equals_a_whole_one(ranks: Ranks, tmp_path: Path) -> None:
    """Bit for bit: one of two processes is killed, and the launch after it begins inside a stage, too."""
    options = {"model__dropout": 0.1, "training__max_steps": 9, "training__save_steps": 2, **STAGES}
    ranks(2, lambda rank: tiny(tmp_path / "whole", **options).status)
    for step, victim, saved in ((2, 0, []), (5, 1, [2, 4]), (7, 0, [2, 4, 6])):
        kills = At("on_gradients", step, lambda run, victim=victim: kill_self(run) if run.rank == victim else None)
        answers = ranks(2, lambda rank, kills=kills: tiny(tmp_path / "parts", plugins=[kills], **options).status)
        assert answers[victim] is None
        assert answers[1 - victim]["error"] == "RankFailed"
        assert sorted(found.step for found in Store(tmp_path / "parts/checkpoints").list()) == saved
    assert ranks(2, lambda rank: tiny(tmp_path / "parts", **options).status) == ["completed"] * 2
    assert files(tmp_path / "parts", 9) == files(tmp_path / "whole", 9)


class CountsCollectives(Everywhere):
    """The collectives of one step, as torch's profiler sees them, the gradients' included."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.counts = step, {}
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        if event.step == self.step:
            self.profile.__enter__()
        if event.step == self.step + 1:
            self.profile.__exit__(None, None, None)
            events = self.profile.key_averages()
            self.counts = {item.key: item.count for item in events if item.key.startswith("gloo:")}


def test_a_step_has_one_host_all_reduce_and_one_of_gradients(ranks: Ranks, tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, int]:
        counts = CountsCollectives(3)
        tiny(tmp_path / "run", plugins=[counts], training__logging_steps=100)
        return counts.counts

    # The tiny model is one bucket of gradients; two micro-batches share its reduction.
    assert ranks(2, work) == [{"gloo:all_reduce": 2}] * 2


def test_a_logged_step_has_one_collective_more(ranks: Ranks, tmp_path: Path) -> None:
    """Also when one process reports more metrics than the others."""

    class Chatty(Everywhere):
        @hookimpl
        def collect_metrics(self, run: Any, event: Any) -> dict[str, Metric]:
            return {} if run.is_main else {"x/one": Metric(1.0)}

    def work(rank: int) -> dict[str, int]:
        counts = CountsCollectives(3)
        tiny(tmp_path / "run", plugins=[counts, Chatty()], training__logging_steps=1)
        return counts.counts

    first, second = ranks(2, work)
    assert first == second
    assert sum(first.values()) == 3


@pytest.mark.parametrize(
    ("scope", "splitter"),
    [
        ("model", "auto"),
        pytest.param("blocks", "auto", marks=pytest.mark.slow),
        pytest.param("model", "split", marks=pytest.mark.slow),
        pytest.param("model", "python_reducer", marks=pytest.mark.slow),
    ],
)
def test_compile_ddp_and_checkpointing_work_together(ranks: Ranks, tmp_path: Path, scope: str, splitter: str) -> None:
    """The last two are canaries: torch's own ways of overlapping once could not be combined with checkpointing."""

    def work(rank: int) -> list[Any]:
        import torch._dynamo

        seen: list[Any] = []

        class Flag(Everywhere):
            @hookimpl
            def on_step_end(self, run: Any, event: Any) -> None:
                seen.append(torch._dynamo.config.optimize_ddp)

        before = torch._dynamo.config.optimize_ddp
        result = tiny(
            tmp_path / "compiled",
            plugins=[Flag()],
            training__compile=True,
            training__compile_scope=scope,
            model__n_layer=1,
            training__compile_backend="aot_eager",
            training__gradient_checkpointing=True,
            training__ddp_optimizer=splitter,
            training__max_steps=2,
        )
        assert torch._dynamo.config.optimize_ddp == before
        return [result.final_loss, seen[-1] == before]

    losses, kept = zip(*ranks(2, work), strict=True)
    eager = ranks(2, lambda rank: tiny(tmp_path / "eager", model__n_layer=1, training__max_steps=2).final_loss)
    assert losses == pytest.approx(eager, rel=1e-5)
    assert kept == ((scope, splitter) in (("blocks", "auto"), ("model", "split")),) * 2


class StepLosses(Everywhere):
    """The loss of each step over all processes, and the two norms of its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: list[tuple[float, float, float]] = []

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        self.before = run.comm.sum(event.loss) / run.world_size, event.grad_norm
        for parameter in run.model.parameters():
            parameter.grad.mul_(2)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.facts.append((*map(float, self.before), float(event.grad_norm)))


def test_the_facts_of_a_step_are_those_of_all_processes(ranks: Ranks, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        plugin = StepLosses()
        tiny(tmp_path / "run", plugins=[plugin], training__logging_steps=1)
        return plugin.facts

    first, second = ranks(2, work)
    assert first == second
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert [loss for loss, _, _ in first] == pytest.approx([row["train/loss"] for row in rows], rel=1e-5)
    assert [after for _, _, after in first] == pytest.approx([row["train/grad_norm"] for row in rows])
    assert [before for _, before, _ in first] == pytest.approx([row["train/grad_norm"] / 2 for row in rows])


def test_the_splitter_takes_a_checkpointed_model(ranks: Ranks) -> None:
    """What the first lines of a run recommend: more graphs than one, and the same gradients."""

    def work(rank: int) -> dict[str, Any]:
        from torch._dynamo.utils import counters

        dist, answer = ProcessGroup.join(60.0), {}
        ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(rank))
        for splitter in ("off", "split"):
            torch.manual_seed(0)
            model = build(ModelConfig(n_embd=192, n_layer=2, n_head=2), vocab_size=64, max_length=16)
            model.set_activation_checkpointing(1)
            WeightCasts.of(model, torch.bfloat16).renew()
            config = TrainingConfig(compile=True, compile_backend="aot_eager", ddp_optimizer=splitter)
            compile_plan = plan(config, dist.device, dist.size, explicit=True)
            wrapped = dist.wrap(model)
            counters.clear()
            with compile_flags(compile_plan), torch.autocast("cpu", torch.bfloat16):
                compile_model(model, compile_plan)
                wrapped(ids, ids).backward()
            norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
            answer[splitter] = [counters["aot_autograd"]["ok"], norms]
        return answer

    for answer in ranks(2, work, 200.0):
        (one, whole), (several, split) = answer["off"], answer["split"]
        assert one == 1 < several
        assert len(whole) == len(split) > 10
        assert split == pytest.approx(whole, rel=1e-5)
