"""``gpt-simple sample``: text from the model that a run left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gpt_simple
from tests.conftest import Shell
from tests.tokenizers import TEXTS, word_piece

GREEDY = ("--temperature", "0", "--tokens", "12")


@pytest.fixture
def trained(shell: Shell, here: Path) -> Path:
    assert shell("run", "config.toml").code == 0
    return here / "out"


def test_it_writes_what_the_model_in_training_would_have_written(here: Path, shell: Shell) -> None:
    class AsksAtTheEnd(gpt_simple.Plugin):  # type: ignore[type-arg]
        text = ""

        @gpt_simple.hookimpl
        def on_run_end(self, run, event):  # type: ignore[no-untyped-def]
            AsksAtTheEnd.text = run.generate("Once", max_new_tokens=40, temperature=0.7, top_k=9, seed=5)

    gpt_simple.train("config.toml", plugins=[AsksAtTheEnd])
    options = ("--prompt", "Once", "--tokens", "40", "--temperature", "0.7", "--top-k", "9", "--seed", "5")
    ended = shell("sample", "out", *options, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert ended.out.endswith(
        "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in AsksAtTheEnd.text) + "\n"
    )


def test_no_control_character_reaches_a_terminal_or_a_file(
    trained: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\tb\nc\u3000é"
    monkeypatch.setattr("gpt_simple.model.generate.generate", lambda *_, **__: f"{text}\x1b[31m\x00\r\x7f\x9b")
    assert shell("sample", "out").out == f"{text}\ufffd[31m\ufffd\ufffd\ufffd\ufffd\n"


def test_a_seed_that_is_too_large_is_refused(shell: Shell) -> None:
    refused = shell("sample", "out", "--seed", str(2**63))
    assert (refused.code, "--seed" in refused.err) == (2, True)


def test_a_seed_is_one_text_and_another_seed_another(trained: Path, shell: Shell) -> None:
    first = shell("sample", "out", "--prompt", "A", "--seed", "3", "--temperature", "1.5", "--count", "2").out
    assert shell("sample", "out", "--prompt", "A", "--seed", "3", "--temperature", "1.5", "--count", "2").out == first
    one, two = first.split("\n\nA", 1)
    assert one.startswith("A")
    assert one.rstrip("\n") != "A" + two.rstrip("\n")


def test_an_older_checkpoint_can_be_sampled(trained: Path, shell: Shell) -> None:
    older, newest = (shell("sample", "out", *GREEDY, "--step", str(step)) for step in (2, 4))
    assert (older.code, newest.code) == (0, 0)
    assert shell("sample", "out", *GREEDY).out == newest.out
    path = "out/checkpoints/step-00000002"
    assert shell("sample", path, *GREEDY).out == shell("sample", path, *GREEDY, "--step", "2").out == older.out
    contradiction = shell("sample", path, "--step", "4")
    assert (contradiction.code, "and --step says 4" in contradiction.err) == (2, True)
    assert "expected one of: 2, 4" in shell("sample", "out/checkpoints/step-00000003").err
    missing = shell("sample", "out", "--step", "3")
    assert missing.code == 4
    assert "expected one of: 2, 4" in missing.err


def test_what_cannot_be_sampled_is_one_sentence(trained: Path, shell: Shell) -> None:
    nothing = shell("sample", "nowhere")
    assert (nothing.code, nothing.err.count("\n")) == (4, 1)
    assert shell("sample", "out", "--device", "nonsense").code == 2
    assert shell("sample", "out", "--top-p", "0").code == 2
    for option in ("--temperature", "--top-p"):
        no_number = shell("sample", "out", option, "nan")
        assert (no_number.code, "expected a number, got NaN" in no_number.err) == (2, True)
    (trained / "run.json").unlink()
    unknown = shell("sample", "out")
    assert unknown.code == 4
    assert "run.json is missing" in unknown.err


def test_a_damaged_checkpoint_is_not_sampled_and_not_touched(trained: Path, shell: Shell) -> None:
    weights = trained / "checkpoints/step-00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    before = sorted(str(path) for path in trained.rglob("*"))
    assert shell("sample", "out", *GREEDY).out == shell("sample", "out", *GREEDY, "--step", "2").out
    assert shell("sample", "out", *GREEDY, "--step", "4").code == 4
    assert sorted(str(path) for path in trained.rglob("*")) == before


def test_the_summary_says_how(shell: Shell) -> None:
    assert "gpt-simple sample out --prompt" in shell("run", "config.toml").out


BIGRAM = """\
from attrs import frozen
from torch import nn
from torch.nn.functional import cross_entropy
from gpt_simple import Plugin, hookimpl

@frozen
class Config:
    name: str = "bigram"

class Model(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.table = nn.Embedding(size, size)

    def forward(self, ids, labels=None):
        logits = self.table(ids)
        return logits if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

class Bigram(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("model", "bigram", lambda config, vocab_size, max_length: Model(vocab_size), config=Config)
"""


def test_a_model_that_a_file_brought_is_sampled_with_the_file(here: Path, shell: Shell) -> None:
    file = here / "bigram.py"
    file.write_text(BIGRAM)
    config = here / "config.toml"
    config.write_text('[model]\nname = "bigram"\n' + config.read_text().split("n_head = 2\n")[1])
    out = shell("run", "config.toml", "-p", "./bigram.py", "--training.max_steps", "2").out
    assert f'gpt-simple sample out -p {file} --prompt "Once" lets the model write' in out
    ended = shell("sample", "out", "-p", "./bigram.py", *GREEDY)
    assert ended.code == 0, ended.err
    unknown = shell("sample", "out")
    assert unknown.code == 2
    assert f"nothing here brings its model 'bigram'; of the run's plugins are missing bigram ({file})" in unknown.err


def test_the_record_of_the_run_is_enough(trained: Path, shell: Shell, here: Path) -> None:
    """The configuration file may be gone or changed."""
    (here / "config.toml").unlink()
    assert json.loads((trained / "run.json").read_text())["facts"]["config"]["model.n_embd"] == 32
    assert shell("sample", "out", *GREEDY).code == 0


@pytest.mark.parametrize("way", ["documents", "dataset", "nanogpt"])
def test_a_tokenizer_with_another_end_trains_and_samples(way: str, here: Path, shell: Shell) -> None:
    Path("t").mkdir()
    Path("t/tokenizer.json").write_text(word_piece().to_str().replace("[SEP]", "<stop>"))
    Path("raw").mkdir()
    for i, document in enumerate(TEXTS):
        Path(f"raw/{i}.txt").write_text(document)
    source = ["--data.source", "files" if way == "documents" else "shards"]
    options = [*source, "--data.tokenizer", "t", "--data.path", "raw", "--data.val_fraction", "0.3"]
    end = ["--data.end_token", "<stop>"]
    if way == "dataset":
        made = shell("tokenize", "--input_dir", "raw", "--output_dir", "d", "--tokenizer", "t", "--end_token", "<stop>")
        assert made.code == 0, made.err
        assert "EOD 1," in shell("data", "inspect", "d").out
        options = [*source, "--data.path", "d", "--data.tokenizer", "bpe"]
        refused = shell("run", "config.toml", *options, "--data.end_token", "a")
        assert (refused.code, "data.end_token" in refused.err) == (3, True)
        end = []
    elif way == "nanogpt":
        Path("raw/train.bin").write_bytes(bytes([5, 0, 6, 0, 1, 0]) * 200)
        Path("raw/val.bin").write_bytes(bytes([5, 0, 6, 0, 1, 0]) * 50)
    else:
        refused = shell("run", "config.toml", *options)
        assert (refused.code, "data.end_token" in refused.err) == (3, True)
        own = shell("run", "config.toml", *options, "--data.tokenizer", "bytes", *end)
        assert (own.code, "data.end_token" in own.err) == (2, True)
    for command in (["validate"], ["run"], ["run", "--training.max_steps", "6"]):
        ended = shell(command[0], "config.toml", *command[1:], *options, *end)
        assert ended.code == 0, ended.err
    assert shell("sample", "out", *GREEDY).code == 0
