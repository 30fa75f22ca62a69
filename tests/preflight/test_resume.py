"""What a launch would resume from: the command reports what the run then does."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.injection import refuse
from tests.cli.test_bad_input import snapshot
from tests.conftest import Shell
from tests.preflight.conftest import Check
from tests.stores import FolderStore, folder

__all__ = ["folder"]


def test_a_resume_is_reported_and_a_changed_one_is_a_warning(check: Check, shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    assert check()["resume"]["fields"]["kind"] == "finished"
    before = snapshot(here)
    more = check("--training.max_steps=6", "--optimizer.learning_rate=0.01")
    assert more["resume"]["fields"]["kind"] == "resume"
    assert more["resume"]["fields"]["step"] == 4
    assert "learning_rate" in more["resume-changed"]["message"]
    assert "learning_rate" not in more["resume"]["message"]
    longer = check("--training.max_steps=6")
    assert "resume-changed" not in longer
    assert "max_steps 4 -> 6" in longer["resume"]["message"]
    assert "resume-changed" not in check("--optimizer.learning_rate=0.01"), "it is finished"
    assert snapshot(here) == before
    assert check("--training.max_steps=6", "--force")["resume"]["fields"]["kind"] == "scratch"


def test_another_model_is_refused_as_the_run_would(check: Check, shell: Shell) -> None:
    refused = check("--training.resume=nowhere", code=4)["resume-refused"]
    assert (refused["place"], "nowhere" in refused["message"]) == ("--training.resume", True)
    assert "training.resume" not in refused["message"]
    assert shell("run", "config.toml", "-q").code == 0
    assert "n_layer" in check("--model.n_layer=2", code=4)["resume-refused"]["message"]
    assert "force" in check("--training.resume=scratch", code=4)["resume-refused"]["message"]


def test_a_truncated_checkpoint_is_passed_over_and_named(check: Check, shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    newest = here / "out/checkpoints/step-00000004/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    found = check()
    assert "model.safetensors" in found["checkpoint-damaged"]["message"]
    assert found["resume"]["fields"]["step"] == 2
    assert found["output"]["fields"]["needed"] > 0, "the run goes on from there and writes"


@pytest.mark.parametrize("name", ["MANIFEST.json", "model.safetensors"])
def test_an_unreadable_checkpoint_is_refused_as_by_the_run(
    check: Check, shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    before = snapshot(here)
    message = f"step-00000004/{name} cannot be read: Permission denied"
    with monkeypatch.context() as patch:
        refuse(here / "out/checkpoints/step-00000004" / name, errno.EACCES, patch)
        assert message in check("--training.max_steps=6", code=4)["resume-refused"]["message"]
        run = shell("run", "config.toml", "-q", "--training.max_steps=6")
    assert (run.code, message in run.err) == (4, True)
    assert snapshot(here) == before


STORE = '''
from tests.stores import Folder as _Folder


class Folder(_Folder):
    """Brings stores."""
'''


def test_a_checkpoint_in_a_store_is_reported_and_not_fetched(
    check: Check, shell: Shell, here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "folder.py").write_text(STORE)
    options = ("-p", "./folder.py", "--training.checkpoint_store=folder", f"--plugins.folder.path={folder}")
    assert "from scratch" in check(*options)["resume"]["message"]
    assert shell("run", "config.toml", "-q", *options).code == 0
    assert check(*options)["resume"]["fields"]["kind"] == "finished"
    shutil.rmtree(here / "out")
    before = snapshot(here)
    found = check(*options, "--training.max_steps=6")["resume"]
    assert found["fields"] == {"kind": "resume", "step": 4, "promise": ""}
    assert "the store 'folder' of the plugin folder" in found["message"]
    assert "holds step 4 of 6, which the run fetches" in found["message"]
    assert "holds 2 checkpoint(s)" in check(*options, "--training.resume=scratch", code=4)["resume-refused"]["message"]
    assert snapshot(here) == before

    def unreachable(method: str, name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(FolderStore, "before", staticmethod(unreachable))
    refused = check(*options, code=4)["resume-refused"]
    assert "cannot be reached: find failed with ConnectionError: no route to host" in refused["message"]
    assert refused["place"] == "--training.checkpoint_store"
