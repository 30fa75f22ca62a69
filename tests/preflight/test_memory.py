"""Predicted memory against what the first real steps use, and the questions that a prediction answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve

from gpt_simple.config.schema import Config, DataConfig, ModelConfig, TrainingConfig, WarmupStage
from gpt_simple.engine.precision import resolve
from gpt_simple.errors import ConfigError
from gpt_simple.hardware import GPUS, find_gpu
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.hooks.preflight import PreflightOptions
from gpt_simple.job.train import train
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugins.memory import start_counting, stop_counting
from gpt_simple.plugins.validate import Validate
from gpt_simple.preflight.dry_run import DryRun
from gpt_simple.preflight.memory import largest_batch, predict_memory
from gpt_simple.spec import resolve_spec
from gpt_simple.testing import train_on_ranks
from tests.preflight.conftest import Check

BASE: dict[str, dict[str, Any]] = {
    "model": {"n_embd": 64, "n_layer": 3, "n_head": 4},
    "data": {"source": "stories", "tokenizer": "bytes", "max_length": 256, "max_documents": 200},
    "optimizer": {"warmup_steps": 1},
    "training": {
        "max_steps": 3,
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "compile": False,
        "gradient_checkpointing": False,
        "eval_steps": None,
        "save_steps": None,
    },
}

CASES: dict[str, dict[str, str]] = {
    "fp32": {},
    "checkpointing": {"training.gradient_checkpointing": "true"},
    "bf16": {"training.mixed_precision": "bf16"},
    "rows read by the training thread": {"data.num_workers": "0"},
    "bf16, every second block": {"training.mixed_precision": "bf16", "training.gradient_checkpointing": "2"},
    "untied, grouped heads, one micro-batch": {
        "model.tie_word_embeddings": "false",
        "model.n_kv_head": "2",
        "training.gradient_accumulation_steps": "1",
    },
    "document mask, dropout": {"data.document_mask": "true", "model.dropout": "0.1"},
    "GPT-2": {
        "model.norm": "layernorm",
        "model.mlp_type": "mlp",
        "model.position": "learned",
        "model.use_bias": "true",
    },
    "GPT-2, bf16, checkpointing": {
        "model.norm": "layernorm",
        "model.mlp_type": "mlp",
        "model.activation": "gelu",
        "model.position": "learned",
        "training.mixed_precision": "bf16",
        "training.gradient_checkpointing": "true",
    },
    "document mask, bf16, best_fit, rows of odd length": {
        "data.document_mask": "true",
        "data.packing": "best_fit",
        "data.max_length": "250",
        "training.mixed_precision": "bf16",
    },
    "bf16, narrow residual stream": {"training.mixed_precision": "bf16", "model.residual_in_fp32": "false"},
    "dropout, checkpointing": {"model.dropout": "0.1", "training.gradient_checkpointing": "true"},
    "large vocabulary, no clipping": {"model.vocab_size": "8192", "optimizer.max_grad_norm": "null"},
    "stages, measured in the first": {
        "training.warmup_stages": "[{steps = 2, gradient_accumulation_steps = 3, length = 64}]",
        "data.document_mask": "true",
    },
    "stages, measured in two": {"training.warmup_stages": "[{steps = 1, length = 64}, {steps = 1, length = 128}]"},
    "one row, qk_norm, three micro-batches": {
        "model.qk_norm": "true",
        "training.per_device_batch_size": "1",
        "training.gradient_accumulation_steps": "3",
    },
}


PARTS = """
import torch
from gpt_simple import Plugin, hookimpl


def optimizer(kind, **options):
    return lambda model, config, device: kind([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)


class Bigram(torch.nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(vocab_size, width), torch.nn.Linear(width, vocab_size)
        self.frozen = torch.nn.Parameter(torch.zeros(2_000_000), requires_grad=False)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids)).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


class Parts(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("model", "bigram", lambda config, *, vocab_size, max_length: Bigram(vocab_size, 64))
        registry.add("optimizer", "sgd", optimizer(torch.optim.SGD, momentum=0.9))
        registry.add("optimizer", "fused_sgd", optimizer(torch.optim.SGD, fused=True))
        registry.add("optimizer", "adafactor", optimizer(torch.optim.Adafactor))
"""


def run(directory: Path, overrides: Mapping[str, str], *plugins: str) -> dict[str, Any]:
    """What the memory plugin says at the end of a run."""
    values = {**overrides, "training.output_dir": str(directory), "plugins.console.progress": "off"}
    switches = Switches(enable=("memory", *plugins), disable=("sample",))
    spec = resolve_spec(None, sections=BASE, overrides=list(values.items()), switches=switches)
    train(spec)
    plugin: Any = next(plugin.instance for plugin in spec.host.plugins if plugin.name == "memory")
    return {"predicted": plugin._prediction, "measured": plugin._measured, "said": plugin.describe()}


@pytest.mark.parametrize("case", CASES)
def test_the_prediction_is_what_an_eager_run_uses(tmp_path: Path, case: str) -> None:
    outcome = run(tmp_path, CASES[case])
    assert outcome["predicted"].training_peak == pytest.approx(outcome["measured"], rel=0.01)
    assert "prediction error" in outcome["said"]


@pytest.mark.parametrize(
    "part", ["optimizer.name=sgd", "optimizer.name=fused_sgd", "optimizer.name=adafactor", "model.name=bigram"]
)
def test_parts_of_plugins_are_predicted_too(tmp_path: Path, part: str) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    outcome = run(tmp_path / "out", dict([part.split("=")]), str(tmp_path / "parts.py"))
    assert outcome["predicted"].training_peak == pytest.approx(outcome["measured"], rel=0.01)


def test_an_evaluation_is_predicted_too() -> None:
    config = small(per_device_batch_size=1, gradient_accumulation_steps=1, gradient_checkpointing=True, eval_steps=1)
    prediction = predict_memory(config, vocab_size=30000)
    cpu = torch.device("cpu")
    dry_run = DryRun.prepare(config, builtin_registry(), resolve("no", cpu), vocab_size=30000)
    dry_run.step()
    resident = sum(prediction.by_category[name] for name in ("parameters", "optimizer", "data"))
    start_counting()
    dry_run.evaluate()
    assert prediction.by_phase["evaluation"] == pytest.approx(resident + stop_counting(), rel=0.01)


def test_a_resumed_run_is_predicted_too(tmp_path: Path) -> None:
    run(tmp_path, {})
    outcome = run(tmp_path, {"training.max_steps": "6"})
    assert outcome["predicted"].training_peak == pytest.approx(outcome["measured"], rel=0.01)


def test_the_copy_that_is_saved_in_the_background_is_predicted(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"training.background_save": "true", "training.save_steps": "1"})
    copy = outcome["predicted"].by_category["copies"]
    assert copy > 0.5 * outcome["predicted"].by_category["optimizer"]
    assert outcome["predicted"].training_peak + copy == pytest.approx(outcome["measured"], rel=0.01)
    assert sum(outcome["predicted"].by_category.values()) == outcome["predicted"].peak


def test_two_processes_use_what_is_predicted(tmp_path: Path) -> None:
    sections = {f"{section}.{name}": value for section, values in BASE.items() for name, value in values.items()}
    quiet: dict[str, Any] = {"training.eval_steps": "null", "training.save_steps": "null", "plugins.memory": {}}
    outcomes = train_on_ranks(output_dir=tmp_path, overrides=sections | quiet)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (outcome,) = [row for row in rows if row.get("name") == "memory"]
    assert outcome["predicted"] == pytest.approx(outcome["measured"], rel=0.01)


@pytest.mark.compiler
@pytest.mark.slow
def test_a_compiled_run_uses_no_more_than_predicted(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"training.compile": "true"})
    assert outcome["predicted"].is_bound
    assert outcome["measured"] <= outcome["predicted"].training_peak


def small(**training: Any) -> Config:
    return Config(
        model=ModelConfig(n_embd=32, n_layer=2, n_head=2),
        data=DataConfig(max_length=64),
        training=TrainingConfig(**{"gradient_checkpointing": False, **training}),
    )


def test_the_categories_add_up_and_parameters_are_exact() -> None:
    prediction = predict_memory(small(), vocab_size=257)
    assert sum(prediction.by_category.values()) == prediction.peak == max(prediction.by_phase.values())
    assert prediction.phase in ("forward", "backward")
    from gpt_simple.model.flops import parameter_count
    from gpt_simple.model.shape import resolve

    count = parameter_count(resolve(small().model, vocab_size=384, max_length=64))
    assert prediction.by_category["gradients"] == 4 * count
    assert prediction.by_category["optimizer"] == pytest.approx(8 * count, rel=0.01)


def test_the_largest_of_all_stages_is_predicted() -> None:
    def peak(*stages: WarmupStage, steps: tuple[int, int] | None = None, **training: Any) -> int:
        config = evolve(small(warmup_stages=stages, **training), data=DataConfig(max_length=64, document_mask=True))
        return predict_memory(config, vocab_size=257, steps=steps).peak

    assert peak(WarmupStage(10, 1, 8)) == peak(), "a shorter and smaller beginning needs no more"
    assert peak(WarmupStage(10, None, 8), steps=(1, 2)) < peak()
    assert peak(WarmupStage(10, None, 8), max_steps=10) == peak(WarmupStage(10, None, 8), steps=(1, 2))
    one = {"gradient_accumulation_steps": 1}
    assert peak(**one) < peak(WarmupStage(10, 2), **one) == peak(gradient_accumulation_steps=2)
    both = peak(WarmupStage(10, 2, 8), **one)
    assert both == max(peak(**one), peak(WarmupStage(10, 2, 8), steps=(1, 2), **one))


def test_positions_and_documents_of_a_batch_count_as_data() -> None:
    def by_category(mask: bool) -> Mapping[str, int]:
        config = evolve(small(), data=DataConfig(max_length=64, document_mask=mask, num_workers=1))
        return predict_memory(config, vocab_size=257).by_category

    plain, masked = by_category(False), by_category(True)
    assert masked["parameters"] == plain["parameters"]
    assert masked["data"] == 2 * plain["data"]


def test_predicting_leaves_no_trace_in_torch() -> None:
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    predict_memory(small(), vocab_size=257, precision="bf16", cuda=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is default
    from gpt_simple.model.loss import ROWS_PER_CHUNK

    assert ROWS_PER_CHUNK["cpu"] == 512


def test_several_processes_keep_the_buckets_of_their_gradients() -> None:
    alone = predict_memory(small(gradient_accumulation_steps=1), vocab_size=257)
    together = predict_memory(small(gradient_accumulation_steps=1), vocab_size=257, world_size=2)
    gradients = together.by_category["gradients"]
    assert alone.by_category["gradients"] < gradients
    assert alone.peak < together.peak <= alone.peak + gradients


def test_checkpointing_saves_and_a_large_model_costs_no_memory() -> None:
    import resource

    config = Config(
        model=ModelConfig(n_embd=4096, n_layer=2, n_head=32),
        data=DataConfig(max_length=1024),
        training=TrainingConfig(per_device_batch_size=8),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpointed = predict_memory(config, vocab_size=50000, precision="bf16")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
    assert checkpointed.peak > 4 * 2**30


@pytest.mark.parametrize("largest", [1, 2, 3, 11, 12, 100, 1000, 4096])
def test_the_largest_batch_fits_and_one_more_row_does_not(largest: int) -> None:
    def peak(config: Config) -> Any:
        rows = config.training.per_device_batch_size
        asked.append(rows)
        return SimpleNamespace(peak=10_000 + 37 * rows + 50 * (rows // 8))  # chunks of a loss make it grow unevenly

    asked: list[int] = []
    room = peak(small(per_device_batch_size=largest)).peak
    assert largest_batch(small(), room, peak) == largest
    assert len(asked) < 12
    assert largest_batch(small(), 10_036, peak) == 0


def test_the_batch_that_is_found_fits_and_one_more_row_does_not(check: Check) -> None:
    def ask(*arguments: str, code: int = 0) -> dict[str, Any]:
        workspaces = 64 * 2**20
        return check("--device", str(1536 * 2**20 + workspaces + 6_000_000), *arguments, code=code)

    found = ask("--fit", "--training.gradient_checkpointing=true")["memory-fit"]["fields"]
    assert 1 < found["batch_without_checkpointing"] < found["batch"]
    for key, checkpointing in (("batch", "true"), ("batch_without_checkpointing", "false")):
        rows, setting = "--training.per_device_batch_size=", f"--training.gradient_checkpointing={checkpointing}"
        assert ask(f"{rows}{found[key]}", setting)["memory-margin"]["fields"]["margin"] >= 0
        assert "memory-too-small" in ask(f"{rows}{found[key] + 1}", setting, code=2)


def test_gpus() -> None:
    assert find_gpu("H100") is GPUS["h100"]
    assert find_gpu("24GiB").memory == 24 * 2**30
    assert find_gpu("1000").memory == 1000
    assert find_gpu("1_000.5 KB").memory == 1_000_500
    with pytest.raises(ConfigError, match=r"h10.*did you mean h100"):
        find_gpu("h10")
    for malformed in ("1.2.3GiB", ".", "_"):
        with pytest.raises(ConfigError, match="unknown"):
            find_gpu(malformed)


def test_the_command_compares_with_a_gpu(check: Check) -> None:
    found = check("--device", "3GiB", "--fit", "--training.mixed_precision=fp16", "--model.n_embd=256")
    assert found["memory"]["fields"]["precision"] == "fp16"
    assert found["memory-margin"]["fields"]["margin"] > 0
    assert found["memory-fit"]["fields"]["batch"] > 16
    small = check("--device", "1GiB", code=2)["memory-too-small"]
    assert small["fields"]["margin"] < 0
    assert "of its 1.00 GiB are kept" in small["message"]


def test_a_sharded_run_is_not_refused_for_a_whole_model(check: Check) -> None:
    options = ("--device", "1GiB", "--training.parallel=fsdp", "--world-size")
    found = check(*options, "8")
    assert "a process that has the whole model" in found["memory"]["message"]
    assert found["memory-too-small"]["severity"] == "warning"
    assert check(*options, "1", code=2)["memory-too-small"]["severity"] == "error"


def test_a_gpu_into_which_nothing_fits_is_named(check: Check) -> None:
    found = check("--device", "1.51GiB", "--fit", "--training.gradient_checkpointing=true", code=2)["memory-fit"]
    assert found["message"] == "not even one row fits into the 10.2 MiB that 1.51GiB has for tensors"
    assert found["fields"] == {"batch": 0, "batch_without_checkpointing": 0}


def test_the_workspaces_of_cublas_are_part_of_the_peak(check: Check) -> None:
    mib = 2**20
    none, some = (predict_memory(small(), vocab_size=257, cuda=True, workspaces=size) for size in (0, 64 * mib))
    assert some.peak - none.peak == 64 * mib == some.by_category["workspaces"]
    assert predict_memory(small(), vocab_size=257).by_category["workspaces"] == 0
    for device, size in (("h100", 64), ("a100", 16.25), ("24GiB", 64)):
        assert check("--device", device)["memory"]["fields"]["by_category"]["workspaces"] == size * mib


@pytest.fixture
def shared_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB, most of which another process has."""
    gib = 2**30
    answers: dict[str, Any] = {
        "is_available": True,
        "get_device_properties": SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * gib),
        "get_device_capability": (9, 0),
        "mem_get_info": (gib // 64, 80 * gib),
        "memory_reserved": gib // 64,
        "memory_allocated": gib // 128,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def test_what_is_free_on_the_gpu_here_counts(check: Check, shared_gpu: None) -> None:
    error = check("--memory", code=2)["memory-too-small"]
    assert "has for tensors (24.0 MiB; other processes and CUDA use the rest of its 80.00 GiB)" in error["message"]
    assert error["fields"]["usable"] == 24 * 2**20


def test_a_run_is_refused_on_a_gpu_that_others_use(shared_gpu: None) -> None:
    def refusal(parameters: int) -> Any:
        model = SimpleNamespace(parameters=lambda: [torch.empty(parameters, device="meta", requires_grad=True)])
        view = SimpleNamespace(device=torch.device("cuda", 0), model=model, is_main=False, config=Config())
        return [finding.message for finding in Validate.check_runtime(None, view, None)]  # type: ignore[arg-type]

    (shared,) = refusal(10**8)
    assert shared.endswith("and cuda:0 has 80.0 GiB, of which 0.0 GiB are free")
    (small_gpu,) = refusal(10**10)
    assert small_gpu.endswith("take 149.0 GiB, and cuda:0 has 80.0 GiB")
    assert refusal(1000) == []


def test_the_search_for_a_batch_ends_at_a_limit(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.preflight.memory.largest_batch", lambda *_: 4096)
    assert "is at least 4096" in check("--device", "h200", "--fit")["memory-fit"]["message"]


def test_a_precision_that_a_gpu_lacks_is_refused(check: Check) -> None:
    refused = check("--device", "v100", "--training.mixed_precision=bf16", code=2)["memory-refused"]
    assert refused["place"] == "--training.mixed_precision"
    assert "v100 only emulates bf16" in refused["message"]


def test_an_unknown_gpu_is_an_error(check: Check) -> None:
    assert "h100" in check("--device", "h10", code=2)["memory-refused"]["message"]


def test_a_batch_fits_into_something(check: Check) -> None:
    assert "--device" in check("--fit", code=2)["memory-refused"]["message"]


def test_memory_is_predicted_only_when_asked(check: Check) -> None:
    assert "memory" not in check()
    assert PreflightOptions().memory is False


def test_an_optimizer_with_weights_for_evaluation_is_predicted() -> None:
    """An evaluation needs a copy of the weights, and a checkpoint holds both sets."""

    class HasModes(torch.optim.SGD):
        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert self.mode == "train"
            super().step()

    def build(model: torch.nn.Module, config: Any, device: torch.device) -> torch.optim.Optimizer:
        return HasModes(model.parameters(), lr=0.1)

    def build_plain(model: torch.nn.Module, config: Any, device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    registry = builtin_registry()
    registry.add("optimizer", "modes", build)
    registry.add("optimizer", "plain", build_plain)
    config = small(save_steps=1, background_save=True)
    modes, plain = (
        predict_memory(
            evolve(config, optimizer=evolve(config.optimizer, name=name)), vocab_size=257, registry=registry, cuda=True
        )
        for name in ("modes", "plain")
    )
    size = plain.by_category["parameters"]
    assert modes.by_phase["evaluation"] - plain.by_phase["evaluation"] == pytest.approx(size, rel=0.05)
    assert modes.copy - plain.copy == pytest.approx(size, rel=0.05)
