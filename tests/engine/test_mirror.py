"""Checkpoints in a store: copied while training goes on, fetched by a new machine, never the reason to lose a run."""

from __future__ import annotations

import filecmp
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

import gpt_simple
from gpt_simple import CheckpointError, GptSimpleError, Plugin, PluginError, hookimpl
from gpt_simple.checkpoint.manifest import Manifest, sha256_of
from gpt_simple.hooks import NoConfig, Registry
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from gpt_simple.run_dir.status import read_status
from gpt_simple.testing import Recorder, Trained, train, train_on_ranks
from gpt_simple.testing.tiny import TINY
from tests.children import At, kill_self
from tests.stores import Folder, FolderStore, folder, held

__all__ = ["folder"]


CONSTANT = {"optimizer.schedule": "constant"}
"""A schedule that does not depend on the number of steps."""


def options(folder: Path, store: str = "folder", **more: Any) -> dict[str, Any]:
    more = {key.replace("__", "."): value for key, value in more.items()}
    return {"training.checkpoint_store": store, "plugins.folder.path": str(folder), **CONSTANT, **more}


def run(root: Path, folder: Path, *plugins: Any, max_steps: int = 3, store: str = "folder", **more: Any) -> Trained:
    recorder = more.pop("recorder", None)
    overrides = options(folder, store, **more)
    return train(Folder, *plugins, output_dir=root, max_steps=max_steps, overrides=overrides, recorder=recorder)


def logged(trained: Trained | Recorder, name: str) -> list[str]:
    recorder = trained if isinstance(trained, Recorder) else trained.recorder
    return [event.message for event in recorder.events("on_log") if event.name == name]


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in {**one, **other})


class Fails:
    """Makes methods of the store fail as long as ``names`` holds them."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.calls: list[tuple[str, str]] = []

    def __call__(self, method: str, name: str) -> None:
        self.calls.append((method, name))
        if method in self.names:
            raise ConnectionError("no route to host")


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Fails:
    failing = Fails()
    monkeypatch.setattr(FolderStore, "before", failing)
    return failing


@pytest.mark.parametrize("background", [False, True])
def test_a_store_follows_the_run_directory(background: bool, tmp_path: Path, folder: Path) -> None:
    plain = train(max_steps=9, overrides=CONSTANT)
    trained = run(tmp_path / "run", folder, max_steps=9, training__background_save=background)
    checkpoints = tmp_path / "run/checkpoints"
    # Retention is applied when a checkpoint is saved, and the store follows.
    assert held(folder) == held(checkpoints)
    assert 2 not in held(folder)
    for step in held(folder):
        compared = filecmp.dircmp(folder / f"step-{step:08}", checkpoints / f"step-{step:08}")
        assert (compared.left_only, compared.right_only, compared.diff_files) == ([], [], [])
    assert equal(trained.weights, plain.weights), "a store is no reason for other weights"
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-store"]


def test_the_local_store_changes_no_file(tmp_path: Path) -> None:
    for name, overrides in (("default", {}), ("local", {"training.checkpoint_store": "local"})):
        train(output_dir=tmp_path / name, overrides=overrides)
    names = [sorted(p.name for p in (tmp_path / name / "checkpoints/step-00000003").iterdir()) for name in ("default",)]
    assert "run.json" not in names[0]
    assert held(tmp_path / "local/checkpoints") == [2, 3]


def test_a_new_machine_goes_on_from_the_store(tmp_path: Path, folder: Path) -> None:
    whole = train(max_steps=6, overrides=CONSTANT)
    first = run(tmp_path / "run", folder)
    record = RunRecord.load(RunDir(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    second = run(tmp_path / "run", folder, max_steps=6)
    assert second.recorder.events("on_run_start")[0].step == 3
    assert equal(second.weights, whole.weights)
    assert first.result.steps == 3
    again = RunRecord.load(RunDir(tmp_path / "run"))
    assert again.run_id == record.run_id
    assert [launch["step"] for launch in again.lineage] == [0, 3]
    assert held(folder) == [2, 3, 4, 6]
    # The best loss of the first machine is known, though that evaluation came after its checkpoint.
    assert second.result.best_val_loss <= first.result.best_val_loss


def test_two_processes_see_one_store(tmp_path: Path, folder: Path) -> None:
    straight = train_on_ranks(max_steps=6, overrides=CONSTANT)
    for steps, promise in ((3, "from scratch"), (6, "resumed from step 3")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        outcomes = train_on_ranks(Folder, output_dir=tmp_path / "run", max_steps=steps, overrides=options(folder))
        assert [each.error for each in outcomes] == ["", ""]
        facts = RunRecord.load(RunDir(tmp_path / "run")).facts
        assert facts["promise"].startswith(promise)
    assert [each.weights for each in outcomes] == [each.weights for each in straight]
    assert held(folder) == [2, 3, 4, 6]
    assert sorted(path.name for path in (folder / "step-00000006").iterdir()) == [
        *("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "plugins.json", "plugins.safetensors"),
        *("run.json", "state.json"),
    ], "a whole directory, of no rank's own"


def flip(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def lose(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def nest(path: Path) -> None:
    (path / "more").symlink_to(path / "state.json")


def misfile(path: Path) -> None:
    """Another program has written the record of the run, with the right checksum."""
    record, manifest = path / "run.json", Manifest.read(path)
    record.write_text('{"run_id": 3}')
    entry = evolve(manifest.files["run.json"], size=record.stat().st_size, sha256=sha256_of(record))
    (path / "MANIFEST.json").write_text(evolve(manifest, files={**manifest.files, "run.json": entry}).to_json())


def rename(path: Path) -> None:
    (path / "MANIFEST.json").write_text(evolve(Manifest.read(path), step=2).to_json())


def cut(path: Path) -> None:
    (path / "MANIFEST.json").write_text("{")


@pytest.mark.parametrize("damage", [flip, lose, nest, misfile, rename, cut])
def test_a_damaged_one_gives_way_to_the_one_before(
    damage: Callable[[Path], None], tmp_path: Path, folder: Path
) -> None:
    whole = train(max_steps=5, overrides=CONSTANT)
    run(tmp_path / "run", folder)
    shutil.rmtree(tmp_path / "run")
    damage(folder / "step-00000003")
    rest = run(tmp_path / "run", folder, max_steps=5)
    assert rest.recorder.events("on_run_start")[0].step == 2
    assert len(logged(rest, "checkpoint_skipped")) == 1
    assert equal(rest.weights, whole.weights)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_nothing_starts_anew_if_all_are_damaged(tmp_path: Path, folder: Path) -> None:
    run(tmp_path / "run", folder)
    shutil.rmtree(tmp_path / "run")
    for path in folder.iterdir():
        flip(path)
    with pytest.raises(CheckpointError, match=r"no checkpoint in the store 'folder' of the .* can be used"):
        run(tmp_path / "run", folder)
    assert not (tmp_path / "run/run.json").exists()
    assert held(tmp_path / "run/checkpoints") == []


def test_a_checkpoint_of_the_run_directory_is_not_fetched(tmp_path: Path, folder: Path, fails: Fails) -> None:
    run(tmp_path / "run", folder)
    run(tmp_path / "run", folder, max_steps=4)
    assert "fetch" not in {method for method, _ in fails.calls}


def test_a_damaged_local_checkpoint_is_never_copied(tmp_path: Path, folder: Path) -> None:
    run(tmp_path / "run", tmp_path / "other")
    flip(tmp_path / "run/checkpoints/step-00000002")
    rest = run(tmp_path / "run", folder, max_steps=4)
    assert held(folder) == [3, 4]
    (skipped,) = logged(rest, "checkpoint_skipped")
    assert "SHA-256" in skipped
    assert "it is not copied to the store 'folder'" in skipped


@pytest.mark.parametrize("lost", [(3,), (2, 3)])
def test_a_damaged_local_checkpoint_is_fetched_again(lost: tuple[int, ...], tmp_path: Path, folder: Path) -> None:
    whole = train(max_steps=5, overrides=CONSTANT)
    run(tmp_path / "run", folder)
    for step in lost:
        flip(tmp_path / f"run/checkpoints/step-{step:08}")
    rest = run(tmp_path / "run", folder, max_steps=5)
    assert rest.recorder.events("on_run_start")[0].step == 3
    assert equal(rest.weights, whole.weights)
    assert (tmp_path / "run/checkpoints/step-00000003.damaged/reason.txt").exists()


def test_the_newest_is_fetched_also_behind_later_sequences(tmp_path: Path, folder: Path) -> None:
    """The run directory has published more often than the machine that went further."""
    run(tmp_path / "ahead", folder, max_steps=5, training__save_steps=None)
    run(tmp_path / "run", tmp_path / "other", max_steps=4, training__save_steps=1)
    with pytest.raises(CheckpointError, match=r"step 5 in .* is of the run \w+, and .* its own place"):
        run(tmp_path / "run", folder, max_steps=6)
    assert held(tmp_path / "run/checkpoints") == [2, 3, 4]
    shutil.copy(tmp_path / "ahead/run.json", tmp_path / "run")
    rest = run(tmp_path / "run", folder, max_steps=6)
    assert rest.recorder.events("on_run_start")[0].step == 5


@pytest.mark.parametrize(("file", "ranks"), [("MANIFEST.json", 1), ("state.json", 1), ("state.json", 2)])
def test_a_kill_while_it_is_copied_loses_nothing(
    file: str, ranks: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(root: Path, store: Path) -> list[str]:
        """The sha256 of the weights in each process."""
        outcomes = train_on_ranks(Folder, ranks=ranks, output_dir=root, max_steps=6, overrides=options(store))
        return [outcome.weights for outcome in outcomes if not outcome.error]

    def kill(method: str, name: str) -> None:
        if (method, name) == ("copy", file) and (folder / "step-00000004").exists():
            kill_self(None)

    whole = launch(tmp_path / "whole", tmp_path / "other")
    assert len(whole) == ranks
    monkeypatch.setattr(FolderStore, "before", staticmethod(kill))
    assert len(launch(tmp_path / "run", folder)) < ranks
    monkeypatch.setattr(FolderStore, "before", staticmethod(lambda method, name: None))
    assert held(folder) == [2], "it is no checkpoint without its manifest"
    assert {2, 4} <= set(held(tmp_path / "run/checkpoints"))
    shutil.copytree(folder, tmp_path / "copy")
    for root, store in ((tmp_path / "new", tmp_path / "copy"), (tmp_path / "run", folder)):
        assert launch(root, store) == whole
        assert {4, 6} <= set(held(store))
        began = RunRecord.load(RunDir(root)).lineage[-1]["step"]
        assert began == 2 if root.name == "new" else began >= 4


@pytest.mark.parametrize("method", ["find", "fetch"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_store_out_of_reach_at_the_start_ends_the_launch(
    method: str, ranks: int, tmp_path: Path, folder: Path, fails: Fails
) -> None:
    """Without it the run would begin again, or go on from where it is not."""
    run(tmp_path / "first", folder)
    fails.names = {method}
    message = rf"checkpoint_store: the store 'folder' of the plugin folder .*{method}.*no route to host.*\"local\""
    if ranks == 1:
        with pytest.raises(CheckpointError, match=message) as raised:
            run(tmp_path / "run", folder)
        assert raised.value.exit_code == 4
        assert [name for name, _ in fails.calls].count(method) >= 3, "it is tried again"
    else:
        outcomes = train_on_ranks(Folder, output_dir=tmp_path / "run", overrides=options(folder))
        assert "no route to host" in outcomes[0].error
        assert outcomes[1].error.startswith("RankFailed")
    assert not (tmp_path / "run/run.json").exists()
    assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").iterdir())


def test_a_short_failure_at_the_start_is_tried_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run", folder)
    shutil.rmtree(tmp_path / "run")
    seen: list[str] = []

    def once(method: str, name: str) -> None:
        seen.append(method)
        if seen.count(method) == 1:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(FolderStore, "before", staticmethod(once))
    assert run(tmp_path / "run", folder, max_steps=4).recorder.events("on_run_start")[0].step == 3


def test_a_store_out_of_reach_for_a_while_costs_nothing(tmp_path: Path, folder: Path, fails: Fails) -> None:
    fails.names = {"published", "removed"}
    plain = train(max_steps=12, overrides=CONSTANT)

    def wait_for_attempts(run: Any) -> None:
        while [method for method, _ in fails.calls].count("published") < 2:
            pass

    def back(run: Any) -> None:
        fails.names = set()

    trained = run(
        tmp_path / "run", folder, At("on_step_end", 4, wait_for_attempts), Back("on_step_end", 8, back), max_steps=12
    )
    assert trained.result.status == "completed"
    assert equal(trained.weights, plain.weights)
    assert held(folder) == held(tmp_path / "run/checkpoints")
    (failure,) = logged(trained, "store_failed")
    assert failure.endswith("no route to host; training goes on, and it is tried again")
    assert "was not copied to the store 'folder'" in failure


class Back(At):
    """Another one: plugins need classes of different names."""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_cannot_reach_the_store_in_the_end_fails(
    ranks: int, tmp_path: Path, folder: Path, fails: Fails
) -> None:
    fails.names = {"published"}
    if ranks == 1:
        recorder = Recorder()
        message = r"no route to host\. The store lacks .*step-00000002, .*step-00000003; nothing is lost"
        with pytest.raises(CheckpointError, match=message) as raised:
            run(tmp_path / "run", folder, recorder=recorder)
        assert raised.value.exit_code == 4
        assert recorder.hooks()[-2:] == ["on_run_error", "on_close"]
    else:
        outcomes = train_on_ranks(Folder, output_dir=tmp_path / "run", overrides=options(folder))
        assert "no route to host" in outcomes[0].error
        assert outcomes[1].error.startswith("RankFailed")
    assert read_status(RunDir(tmp_path / "run")).state == "failed"
    assert held(tmp_path / "run/checkpoints") == [2, 3]
    assert held(folder) == []
    with pytest.raises(CheckpointError, match="no route to host"):
        run(tmp_path / "run", folder)
    fails.names = set()
    finished = run(tmp_path / "run", folder)
    assert finished.result.status == "completed"
    assert held(folder) == [2, 3], "the same command has copied them"
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-store"]


def test_training_does_not_wait_for_the_store(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before the first copy begins; until then retention leaves the checkpoint that is copied."""
    last_step, found = threading.Event(), []

    def wait(method: str, name: str) -> None:
        if method == "published" and name == "step-00000002":
            assert last_step.wait(60)
            found.extend(held(tmp_path / "run/checkpoints"))

    monkeypatch.setattr(FolderStore, "before", staticmethod(wait))
    ends = At("on_step_end", 9, lambda run: last_step.set())
    trained = run(tmp_path / "run", folder, ends, max_steps=9, training__keep_last_k=1, training__eval_steps=None)
    assert trained.result.status == "completed"
    assert 2 in found
    assert 4 not in found
    assert {8, 9} <= set(held(folder))


def test_a_run_that_fails_brings_its_checkpoints_to_the_store(tmp_path: Path, folder: Path) -> None:
    for background in (False, True):
        with pytest.raises(PluginError):
            run(
                tmp_path / f"run{background}",
                folder / str(background),
                Fault,
                training__background_save=background,
                max_steps=5,
            )
        assert held(folder / str(background)) == [2]


class Fault(Plugin[NoConfig]):
    on_error = "abort"

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        if event.step == 3:
            raise ValueError("boom")


def force(root: Path, folder: Path, store: str = "folder") -> int:
    values = {**TINY, **options(folder, store), "training.output_dir": str(root), "training.max_steps": 2}
    return gpt_simple.train(overrides=values, plugins=[Folder], force=True).steps


def test_force_discards_the_run_in_the_store_too(tmp_path: Path, folder: Path, fails: Fails) -> None:
    run(tmp_path / "run", folder, max_steps=5)
    assert held(folder) == [2, 4, 5]
    fails.names = {"removed"}
    with pytest.raises(CheckpointError, match="cannot be emptied: remove step-00000002 failed"):
        force(tmp_path / "run", folder)
    assert held(tmp_path / "run/checkpoints") == [2, 4, 5]
    fails.names = set()
    assert force(tmp_path / "run", folder) == 2
    assert held(folder) == held(tmp_path / "run/checkpoints") == [2]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]


def test_a_damaged_record_of_the_run_is_named(tmp_path: Path, folder: Path) -> None:
    """It is no reason to go back to an earlier checkpoint."""
    run(tmp_path / "run", folder)
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged .* move it away"):
        run(tmp_path / "run", folder)
    assert held(tmp_path / "run/checkpoints") == []


def test_a_branch_is_found_in_its_own_store(tmp_path: Path, folder: Path) -> None:
    """The same command on a new machine goes on with the branch, and does not begin it again."""
    origin = run(tmp_path / "origin", tmp_path / "first", max_steps=2).result.checkpoint_path
    branch: dict[str, Any] = {"training__resume": str(origin)}
    for steps, began in ((3, 2), (5, 3)):
        recorder = run(tmp_path / "branch", folder, max_steps=steps, **branch).recorder
        assert recorder.events("on_run_start")[0].step == began
        shutil.rmtree(tmp_path / "branch")
    assert held(folder) == [3, 4, 5]


def test_a_store_that_keeps_everything_is_not_mixed(tmp_path: Path, folder: Path) -> None:
    run(tmp_path / "run", folder, max_steps=9, store="keeping")
    assert held(folder) == [2, 4, 6, 8, 9]
    with pytest.raises(CheckpointError, match=r"holds 5 .*, the newest step-00000009, and it cannot remove"):
        force(tmp_path / "run", folder, "keeping")
    assert 9 in held(tmp_path / "run/checkpoints")
    for store in ("keeping", "folder"):
        with pytest.raises(CheckpointError, match=r'training\.resume is "scratch" but the store'):
            run(tmp_path / "new", folder, store=store, training__resume="scratch")
    assert not (tmp_path / "new").exists()


class Lacks:
    def find(self) -> list[str]:
        return []


class Counts(Lacks):
    fetch = published = Lacks.find

    def find(self) -> list[Any]:
        return [3]


def needs_option(config: Any) -> None:
    raise ModuleNotFoundError("No module named 'boto3'")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda config: Lacks(), "is made as a Lacks, which has no fetch, published"),
        (lambda config: Counts(), "finds 3; expected names such as 'step-00001000'"),
        (needs_option, "could not be made: ModuleNotFoundError: No module named 'boto3'"),
    ],
)
def test_a_store_that_is_none_is_the_plugins_defect(build: Any, message: str, tmp_path: Path) -> None:
    class Brings(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("store", "odd", build)

    with pytest.raises(PluginError, match=f"store 'odd' of the plugin brings .*{message}") as raised:
        train(Brings, output_dir=tmp_path / "run", overrides={"training.checkpoint_store": "odd"})
    assert raised.value.exit_code == 5
    assert not (tmp_path / "run").exists()


def test_an_unknown_store_is_a_mistake_of_the_configuration() -> None:
    with pytest.raises(GptSimpleError, match=r"there is no store 's3'.*expected one of local"):
        train(overrides={"training.checkpoint_store": "s3"})


def test_foreign_names_in_a_store_are_left_alone(tmp_path: Path, folder: Path) -> None:
    for name in ("latest", ".step-00000009.tmp-1", "step-9"):
        (folder / name).mkdir(parents=True)
        (folder / name / "MANIFEST.json").write_text("{}")
    run(tmp_path / "run", folder)
    assert json.loads((folder / "latest/MANIFEST.json").read_text()) == {}
    assert {path.name for path in folder.iterdir()} >= {"latest", "step-00000002", "step-00000003"}
