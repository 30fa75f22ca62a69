"""Shared by all tests: one cache of prepared data, no trace of the user's environment, and a command line."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import frozen

from gpt_simple.cli.main import main
from gpt_simple.launch.signals import STOPPING

pytest_plugins = ("tests.tiny", "tests.children", "tests.packages")

# One thread, said before torch is imported. Two test processes on two cores need no more, and tests fork: a forked
# process has none of its parent's worker threads and would wait for them in its first kernel.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Programs hold back what they write into a pipe, as they do for users: what is lost then is found only so.
os.environ.pop("PYTHONUNBUFFERED", None)

CONFIG = """\
[model]
n_embd = 32
n_layer = 1
n_head = 2

[data]
source = "stories"
tokenizer = "bytes"
max_length = 32
max_documents = 200

[training]
max_steps = 4
per_device_batch_size = 2
gradient_accumulation_steps = 1
compile = false
gradient_checkpointing = false
logging_steps = 2
eval_steps = 4
save_steps = 2
output_dir = "out"

[optimizer]
warmup_steps = 1
"""


VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def selects_gpus(expression: str) -> bool:
    """Whether pytest's ``-m`` asks for the tests that need a GPU."""
    return bool(re.search(r"(?<!not )\bgpu\b", " ".join(expression.split())))


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, also from the processes that tests start: on one, a run has other bits and other messages."""
    if not selects_gpus(config.option.markexpr):
        os.environ.update(dict.fromkeys(VISIBLE, ""))


@frozen
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Shell = Callable[..., Ended]


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of one process share, so that the stories are tokenized once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, data_cache: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("GPT_SIMPLE", "ACCELERATE_", "WANDB_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(data_cache))


@pytest.fixture(autouse=True)
def signal_handlers() -> None:
    """The usual ones in every test: nohup and a shell's background jobs ignore signals, and so does a command of ours
    that was called in this process, as is right at the end of a program."""
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a small ``config.toml`` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def shell(here: Path, capfd: pytest.CaptureFixture[str]) -> Shell:
    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as leaving:
            main(list(arguments))
        out, err = capfd.readouterr()
        return Ended(int(leaving.value.code or 0), out, err)  # type: ignore[arg-type]

    return run
