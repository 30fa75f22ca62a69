"""Commands whose memory is used up, or whose device is lost: one line and exit code 1, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Shell

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB."

LOST = """
import os, sys
import torch
from gpt_simple.cli.main import main

class OnDevice:
    lost = False

    def __del__(self):  # the destructor of a tensor on a lost device
        if OnDevice.lost:
            os.write(2, b"terminate called\\n")
            os._exit(134)

real, calls = torch.Tensor.backward, []

def backward(self, *arguments, **named):
    held = OnDevice()
    calls.append(self)
    if len(calls) == 3:
        OnDevice.lost = True
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    real(self, *arguments, **named)

torch.Tensor.backward = backward
sys.argv[1:] = ["run", "config.toml", "--training.save_steps", "1"]
main()
"""


def refuse(*arguments: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError(OUT)


@pytest.fixture
def full() -> Iterator[pytest.MonkeyPatch]:
    """Attention finds no memory, in training as in an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
        yield patch


def test_a_run_ends_with_one_line_and_goes_on(shell: Shell, here: Path, full: pytest.MonkeyPatch) -> None:
    ended = shell("run", "config.toml")
    assert ended.code == 1
    assert ended.err.startswith(
        "error: the device is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); set"
    )
    assert "`gpt-simple validate config.toml --fit` finds" in ended.err
    assert "Traceback" not in ended.err
    assert "failed" in shell("status", "out").out
    full.undo()
    assert shell("run", "config.toml").code == 0


def test_a_full_host_ends_with_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_host(*arguments: Any, **named: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(torch.Tensor, "backward", refuse_host)
    ended = shell("run", "config.toml")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("error: the host is out of memory (MemoryError); set training.per_device_batch_size")


def test_sampling_offers_the_cpu(shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("run", "config.toml").code == 0
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    ended = shell("sample", "out")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.endswith("Tried to allocate 2.00 GiB); a run may be using it: try --device cpu\n")


def test_a_probe_without_memory_is_not_made(shell: Shell, here: Path, full: pytest.MonkeyPatch) -> None:
    ended = shell("validate", "config.toml", "--probe")
    assert ended.code == 2
    assert "the probe was not made: the device is out of memory" in " ".join(ended.out.split())
    assert "plugin-failed" not in ended.out


def test_a_lost_device_ends_it_before_tensors_are_freed(here: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    errors = ended.stderr.splitlines()
    assert errors == [line for line in errors if "terminate" not in line]
    assert errors[-1].startswith("error: the device is lost: every call fails from now on (CUDA error: unspecified")
    assert '"state": "failed"' in (here / "out/status.json").read_text()
    script = "from gpt_simple.cli.main import main; main()"
    again = subprocess.run([sys.executable, "-c", script, "run", "config.toml"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


SEGMENTS = """
import os, sys
from gpt_simple.cli.main import main
sys.argv[1:] = ["status", "nowhere"]
try:
    main()
finally:
    print([f"{name}={value}" for name, value in os.environ.items() if name.endswith("ALLOC_CONF")])
"""


@pytest.mark.parametrize("own", ["", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_are_expandable_unless_the_user_decides(own: str) -> None:
    setting = {own: "backend:native"} if own else {}
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | setting
    ended = subprocess.run([sys.executable, "-c", SEGMENTS], capture_output=True, text=True, env=environment)
    expected = f"{own}=backend:native" if own else "PYTORCH_ALLOC_CONF=expandable_segments:True"
    assert ended.stdout == f"{[expected]}\n"


AT_IMPORT = """
import os, sys

class Notes:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            open(os.environ["NOTES"], "a").write(os.environ.get("PYTORCH_ALLOC_CONF", "none") + "\\n")

sys.meta_path.insert(0, Notes())
"""


def test_all_processes_have_them_before_they_import_torch(here: Path, tmp_path: Path) -> None:
    """torch reads the variable once. The launcher imports torch, too."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(AT_IMPORT)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    environment |= {"PYTHONPATH": path, "NOTES": str(tmp_path / "notes")}
    command = [sys.executable, "-m", "gpt_simple", "run", "config.toml", "--nproc_per_node", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "notes").read_text().splitlines() == ["expandable_segments:True"] * 2
