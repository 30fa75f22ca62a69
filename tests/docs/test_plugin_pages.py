"""The pages on plugins: the tutorial runs as written, recipes keep the contract, the reference is up to date."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gpt_simple import CheckpointError, ConfigError, Plugin, hookimpl
from gpt_simple.hooks import HOOKS, Component, run
from gpt_simple.hooks.components import BUILTIN, KINDS, NEEDED
from gpt_simple.testing import check_contract, train

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / "plugins" / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("build_hook_reference")
    finally:
        sys.path.remove(str(DOCS))


@pytest.mark.parametrize("name", ["hooks.md", "run.md", "components.md"])
def test_a_page_of_the_reference_is_the_contract(name: str, reference: ModuleType) -> None:
    assert [path.name for path in reference.PAGES] == ["hooks.md", "run.md", "components.md"]
    path = DOCS / "plugins" / name
    text = path.read_text(encoding="utf-8")
    assert text == reference.PAGES[path](), "outdated; run: python docs/build_hook_reference.py"


def test_the_reference_has_every_hook_member_and_kind(reference: ModuleType) -> None:
    hooks, run_page, components = ((DOCS / "plugins" / path.name).read_text() for path in reference.PAGES)
    assert all(f"## {hook}\n" in hooks for hook in HOOKS)
    assert all(f"\n### run.{name}\n" in run_page for name in vars(run.Run) if not name.startswith("_"))
    assert all(f"\n## {kind}\n" in components for kind in KINDS)
    protocols = (run.Run, run.Control, run.Log, run.Comm, run.Checkpoints)
    lacking = [member.name for cls in protocols for member in reference._members(cls) if not member.about]
    assert lacking == []


def test_a_component_is_called_and_used_as_its_page_says(
    reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples train, each with the part that it shows."""
    called: dict[str, str] = {}
    build = Component.build

    def checked(self: Component, *arguments: Any, **named: Any) -> Any:
        factory, protocols, _ = reference.PARTS[self.kind]
        signature = inspect.signature(factory.__call__)
        assert list(signature.bind(None, *arguments, **named).arguments) == list(signature.parameters)
        part = build(self, *arguments, **named)
        if self.owner != BUILTIN:
            assert any(all(hasattr(part, m.name) for m in reference._members(cls)) for cls in protocols), part
            called[self.name] = self.kind
        return part

    monkeypatch.setattr(Component, "build", checked)
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(tmp_path / "cache"))  # data that are reused need no tokenizer
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "components"}
    for language, text in blocks("components.md"):
        if language == "python":
            exec(compile(text, "components.md", "exec", dont_inherit=True), namespace)
    assert {*called.values()} == {*KINDS}
    assert {"counting", "endless"} <= called.keys()


def test_what_a_part_needs_is_in_its_protocol(reference: ModuleType) -> None:
    own: dict[str, type] = {"model": torch.nn.Module, "optimizer": torch.optim.Optimizer}
    for kind, needed in NEEDED.items():
        _, protocols, _ = reference.PARTS[kind]
        members = {member.name for cls in protocols for member in reference._members(cls)}
        assert {*needed} <= members | {*dir(own.get(kind, object))}


def recipes() -> list[type[Plugin[Any]]]:
    namespace: dict[str, Any] = {"__name__": "cookbook"}
    for language, text in blocks("cookbook.md"):
        if language == "toml":
            continue  # the tests of the recipe use it
        assert language == "python"
        exec(compile(text, "cookbook.md", "exec", dont_inherit=True), namespace)
    return [value for value in namespace.values() if isinstance(value, type) and value.__module__ == "cookbook"]


COOKBOOK = recipes()
RECIPES = {cls.__name__: cls for cls in COOKBOOK if issubclass(cls, Plugin)}
OPTIONS: dict[str, dict[str, Any]] = {
    "FreezeEmbedding": {"observes": False},
    "Thaw": {"observes": False},
    "Grow": {"observes": False},
    "SlowGains": {"observes": False},
    "Sam": {"observes": False, "overrides": {"training.step": "sam"}},
    "Arithmetic": {
        "observes": False,
        "overrides": {"data.source": "sums", "data.packing": "best_fit", "data.val_fraction": 0.3},
    },
    "LrFinder": {"observes": False, "overrides": {"optimizer.schedule": "range_test"}},
    "Zigzag": {"observes": False, "overrides": {"optimizer.schedule": "zigzag"}},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a model with the shape of the tiny one."""
    trained = train(output_dir=tmp_path_factory.mktemp("teacher"), max_steps=2, overrides={"training.seed": 7})
    return str(trained.result.checkpoint_path)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_keep_the_contract(name: str, teacher: str) -> None:
    options = OPTIONS.get(name, {})
    if name == "Distill":
        options = {"observes": False, "overrides": {"training.loss": "distill", "plugins.distill.teacher": teacher}}
    check_contract(RECIPES[name], **options)


class Bucket:
    """A client of S3 without a network. ``broken``: how many more uploads work, None for all."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.broken: int | None = None

    def get_paginator(self, name: str) -> Bucket:
        assert name == "list_objects_v2"
        return self

    def paginate(self, *, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:
        assert Bucket == "models"
        keys = sorted(key for key in self.objects if key.startswith(Prefix))
        yield from ({"Contents": [{"Key": key} for key in page]} for page in batched(keys, 5)) if keys else [{}]

    def download_file(self, bucket: str, key: str, filename: str) -> None:
        Path(filename).write_bytes(self.objects[key])

    def upload_file(self, filename: str, bucket: str, key: str) -> None:
        if self.broken is not None:
            self.broken -= 1
            if self.broken < 0:
                raise ConnectionError("no route to host")
        self.objects[key] = Path(filename).read_bytes()

    def delete_object(self, *, Bucket: str, Key: str) -> None:
        self.objects.pop(Key, None)


def batched(values: list[str], size: int) -> list[list[str]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """What the recipe's client of S3 reads and writes; attempts follow one another at once."""
    bucket = Bucket()
    boto3: Any = ModuleType("boto3")
    boto3.client = lambda service, config: bucket
    limits: Any = ModuleType("botocore.config")
    limits.Config = dict
    for name, module in (("boto3", boto3), ("botocore", ModuleType("botocore")), ("botocore.config", limits)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("gpt_simple.engine.mirror._PAUSES", (0.01,))
    return bucket


OBJECTS = {"training.checkpoint_store": "s3", "plugins.s3.bucket": "models", "plugins.s3.prefix": "/me/first/"}


def steps_in(bucket: Bucket) -> list[str]:
    return sorted(key.split("/")[2] for key in bucket.objects if key.endswith("/MANIFEST.json"))


def test_the_recipe_for_s3_brings_a_run_to_a_new_machine(bucket: Bucket, tmp_path: Path) -> None:
    bucket.objects["me/first-try/step-00000009/MANIFEST.json"] = b"{}"
    overrides = OBJECTS | {"training.keep_last_k": 1, "training.eval_steps": None}
    train(RECIPES["S3"], output_dir=tmp_path / "run", max_steps=5, overrides=overrides)
    assert [step for step in steps_in(bucket) if step != "step-00000009"] == ["step-00000004", "step-00000005"]
    assert not [key for key in bucket.objects if "step-00000002" in key], "it follows retention"
    shutil.rmtree(tmp_path / "run")
    rest = train(RECIPES["S3"], output_dir=tmp_path / "run", max_steps=6, overrides=overrides)
    assert rest.recorder.events("on_run_start")[0].step == 5
    assert "me/first/step-00000006/model.safetensors" in bucket.objects


def test_an_upload_to_s3_that_breaks_off_is_no_checkpoint(bucket: Bucket, tmp_path: Path) -> None:
    bucket.broken = 4
    with pytest.raises(CheckpointError, match="ConnectionError: no route to host"):
        train(RECIPES["S3"], output_dir=tmp_path / "run", overrides=OBJECTS)
    assert bucket.objects
    assert steps_in(bucket) == []
    bucket.broken = None
    assert train(RECIPES["S3"], output_dir=tmp_path / "run", overrides=OBJECTS).result.status == "completed"
    assert steps_in(bucket) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("missing", ["bucket", "prefix"])
def test_the_recipe_for_s3_names_an_option_that_is_missing(missing: str, bucket: Bucket) -> None:
    with pytest.raises(ConfigError, match=f"plugins.s3.{missing}: the store s3 needs a {missing}"):
        train(RECIPES["S3"], overrides=OBJECTS | {f"plugins.s3.{missing}": ""})


(RANGE_TEST,) = [tomllib.loads(text) for language, text in blocks("cookbook.md") if language == "toml"]


def range_test(*others: Any, output_dir: Path, **overrides: Any) -> Any:
    values = {f"{section}.{key}": value for section, table in RANGE_TEST.items() for key, value in table.items()}
    del values["training.max_steps"], values["training.output_dir"]
    return train(RECIPES["LrFinder"], *others, output_dir=output_dir, max_steps=60, overrides=values | overrides)


def suggestion(trained: Any) -> list[str]:
    return [event.message for event in trained.recorder.events("on_log") if "falls fastest" in event.message]


def test_the_recipe_for_a_learning_rate_ends_with_one(tmp_path: Path) -> None:
    high = {"optimizer.learning_rate": 1000.0, "optimizer.min_lr_ratio": 1e-8}
    whole = range_test(output_dir=tmp_path / "whole", **high)
    rates = [event.metrics["train/lr"] for event in whole.recorder.events("on_metrics")]
    assert rates == pytest.approx([1e-5 * 1e8 ** (step / 59) for step in range(len(rates))])
    assert (whole.result.status, len(rates)) == ("completed", whole.result.steps)
    assert whole.result.steps < 60
    assert whole.result.reason == f"the loss diverges at a learning rate of {rates[-1]:.1e}"
    (message,) = suggestion(whole)
    fastest, lowest = (float(number) for number in re.findall(r"\d\.\de[+-]\d+", message))
    assert 1e-4 < fastest <= lowest < rates[-1]

    class Stops(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            if event.step == 20:
                run.control.stop("for a test")

    assert suggestion(range_test(Stops, output_dir=tmp_path / "parts", **high)) == []
    assert suggestion(range_test(output_dir=tmp_path / "parts", **high)) == [message]


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer.schedule", "cosine"), ("optimizer.min_lr_ratio", 0.0), ("training.logging_steps", 5)],
)
def test_the_recipe_for_a_learning_rate_checks_its_keys(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)) as caught:
        range_test(output_dir=tmp_path, **{key: value})
    assert len(caught.value.problems) == 1


@pytest.mark.slow
def test_the_tutorial_works_as_it_is_written(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    site = tmp_path / "site"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
        # The package is installed into a directory of its own, and nothing is downloaded.
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    for language, text in blocks("tutorial.md"):
        first, _, rest = text.partition("\n")
        if first.startswith("# file: "):
            path = tmp_path / first.removeprefix("# file: ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest, encoding="utf-8")
        elif language == "console":
            script = "\n".join(line.removeprefix("$ ") for line in text.splitlines())
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        else:
            assert language == "", "a block of the tutorial that no test runs"
    assert len((tmp_path / "outputs" / "loss.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "outputs2" / "other.jsonl").exists()
    assert not list((tmp_path / "outputs3").glob("*loss*"))
