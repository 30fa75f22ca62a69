"""Data, resume and output: that the command tells what the run then does."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt_simple.config.schema import TrainingConfig
from gpt_simple.preflight.output import most_checkpoints
from tests.checkpoint.injection import refuse
from tests.cli.test_bad_input import snapshot
from tests.conftest import CONFIG, Shell
from tests.preflight.conftest import Check


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data.source=files", "--data.path=nowhere"], 3, "nowhere"),
        (["--data.format=pretokenized", "--data.source=shards", "--data.path=."], 3, "dataset.json"),
        (["--data.tokenizer", "gpt2.json"], 3, "gpt2.json"),
    ],
)
def test_missing_data_are_an_error_of_their_class(check: Check, arguments: list[str], code: int, words: str) -> None:
    finding = check(*arguments, code=code)["data-refused"]
    assert words in finding["message"]


def test_data_that_are_not_prepared_yet_are_guessed(check: Check, shell: Shell, here: Path) -> None:
    lines = [json.dumps({"text": f"Story {number} of a very quick brown fox."}) for number in range(500)]
    (here / "corpus.jsonl").write_text("\n".join(lines))
    arguments = ["--data.source=files", "--data.path=corpus.jsonl", "--data.max_documents=500"]
    guessed = check(*arguments)["data"]["fields"]
    assert guessed["estimated"]
    assert shell("run", "config.toml", "-q", *arguments).code == 0
    known = check(*arguments)["data"]["fields"]
    assert not known["estimated"]
    assert guessed["train_tokens"] == pytest.approx(known["train_tokens"], rel=0.5)


RAW = ["--data.source=files", "--data.path=corpus.jsonl"]


@pytest.mark.parametrize(
    ("text", "arguments", "code", "found", "words"),
    [
        ("A fox. " * 9999, ["--model.vocab_size=100"], 2, "vocabulary-too-small", "257"),
        ("A fox. " * 9999, ["--data.val_fraction=0"], 3, "validation-too-short", "has 0 tokens"),
        ("fox", [], 3, "validation-too-short", "has at most"),
        (
            "A fox. " * 9999,
            ["--data.text_key=body"],
            3,
            "data-refused",
            "corpus.jsonl:1: expected the text under 'body'",
        ),
        ("A fox. " * 9999, ["--data.curriculum=[{duration_tokens=99, mix={web=1}}]"], 2, "data-refused", "'web'"),
    ],
)
def test_what_cannot_be_prepared_is_an_error_before_it_is_tried(
    check: Check, shell: Shell, here: Path, text: str, arguments: list[str], code: int, found: str, words: str
) -> None:
    (here / "corpus.jsonl").write_text(json.dumps({"text": text}) + "\n")
    finding = check(*RAW, *arguments, code=code)[found]
    assert (finding["severity"], finding["exit_code"]) == ("error", code)
    assert words in finding["message"]
    assert shell("run", "config.toml", "-q", *RAW, *arguments).code == code


def test_what_only_seems_too_little_is_a_warning_that_says_so(check: Check, here: Path) -> None:
    (here / "corpus.jsonl").write_text(json.dumps({"text": "A fox. " * 60}) + "\n")
    found = check(*RAW, "--data.on_exhaustion=halt", "--training.max_steps=999", "--model.vocab_size=300")
    assert "the data end after about step 6 of 999" in found["data-end-early"]["message"]
    assert "an estimate" in found["validation-too-short"]["message"]
    trained = check(*RAW, "--data.tokenizer=bpe", "--model.vocab_size=300")["vocabulary-too-small"]
    assert (trained["severity"], "up to 8192" in trained["message"]) == ("warning", True)


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 257), ("bpe", 300), ("bpe", 512), ("bpe", 2048)])
def test_tokens_are_guessed_by_the_vocabulary(
    check: Check, shell: Shell, here: Path, tokenizer: str, size: int
) -> None:
    import pydoc_data.topics

    lines = [json.dumps({"id": "x" * 40, "text": text}) for text in pydoc_data.topics.topics.values()]
    (here / "corpus.jsonl").write_text("\n".join(lines))
    arguments = [*RAW, f"--data.tokenizer={tokenizer}", f"--data.tokenizer_vocab_size={size}", "--training.max_steps=1"]
    guessed = check(*arguments)["data"]["fields"]["train_tokens"]
    assert shell("run", "config.toml", "-q", *arguments).code == 0
    known = check(*arguments)["data"]["fields"]["train_tokens"]
    assert guessed == pytest.approx(known, rel=0.03 if tokenizer == "bytes" else 0.25)


def test_after_a_run_the_data_are_known_exactly(check: Check, shell: Shell) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    found = check()
    fields = found["data"]["fields"]
    assert not fields["estimated"]
    assert fields["vocab_size"] == 257
    assert fields["train_tokens"] > fields["val_tokens"] > 0
    samples = 4 * 2
    assert found["epochs"]["fields"]["epochs"] == pytest.approx(samples / sum(fields["buckets"].values()))


def test_the_data_that_end_early_are_told_with_the_step(check: Check, shell: Shell) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    rows = sum(check()["data"]["fields"]["buckets"].values())
    finding = check("--training.max_steps=9999999", "--data.on_exhaustion=halt")
    assert f"step {rows // 2:,} of" in finding["data-end-early"]["message"]


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(check: Check, shell: Shell) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    assert "257" in check("--model.vocab_size=200", "--force", code=2)["vocabulary-too-small"]["message"]


def test_a_resume_is_told_and_a_changed_one_is_a_warning(check: Check, shell: Shell, here: Path) -> None:
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
    told = f"step-00000004/{name} cannot be read: Permission denied"
    with monkeypatch.context() as patch:
        refuse(here / "out/checkpoints/step-00000004" / name, errno.EACCES, patch)
        assert told in check("--training.max_steps=6", code=4)["resume-refused"]["message"]
        run = shell("run", "config.toml", "-q", "--training.max_steps=6")
    assert (run.code, told in run.err) == (4, True)
    assert snapshot(here) == before


def test_the_size_of_a_checkpoint_is_known_beforehand(check: Check, shell: Shell, here: Path) -> None:
    arguments = ["--model.n_layer=2", "--training.max_steps=40", "--training.eval_steps=1", "--training.save_steps=40"]
    told = check(*arguments)["output"]
    assert "MiB for up to 1 checkpoint of at most" in told["message"]
    assert shell("run", "config.toml", "-q", *arguments).code == 0
    files = {file.name: file.stat().st_size for file in (here / "out/checkpoints/step-00000040").iterdir()}
    tensors = files["model.safetensors"] + files["optimizer.safetensors"]
    assert tensors * 0.95 < sum(files.values()) <= told["fields"]["checkpoint_bytes"] <= sum(files.values()) * 1.05


def test_too_little_room_is_a_warning_and_none_at_all_an_error(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    size = check()["output"]["fields"]["checkpoint_bytes"]
    for free, code, severity in ((size, 0, "warning"), (size // 2, 4, "error")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        found = check(code=code)["space-short"]
        assert (found["severity"], found["fields"]["free"]) == (severity, free)


def test_a_run_that_cannot_save_is_refused_unless_it_is_finished(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert shell("run", "config.toml", "-q").code == 0
    assert "could save nothing" in shell("run", "config.toml", "-q", "--training.max_steps=6").err
    # What --force discards makes the room.
    assert shell("validate", "config.toml", "--force").code == 0


def test_an_output_that_cannot_be_written(check: Check) -> None:
    assert "config.toml" in check("--training.output_dir=config.toml", code=2)["output-refused"]["message"]


def test_how_many_checkpoints_there_are_at_once() -> None:
    assert most_checkpoints(TrainingConfig(max_steps=10, save_steps=1, keep_last_k=None)) == 10
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=1, keep_last_k=3, eval_steps=None)) == 4
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=1, keep_last_k=1, eval_steps=5)) == 4
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=10, keep_last_k=3, keep_milestone_every=50)) == 5
    # At the end the newest three and the eight older milestones; the steps between them are not evaluated.
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=5, keep_last_k=3, keep_milestone_every=10)) == 12
    assert most_checkpoints(TrainingConfig(max_steps=100, save_steps=None, keep_last_k=3)) == 1


def test_a_validation_split_that_is_too_short_is_an_error(check: Check, shell: Shell, here: Path) -> None:
    (here / "config.toml").write_text(CONFIG.replace("max_length = 32", "max_length = 31"))
    assert shell("run", "config.toml", "-q", "--training.eval_steps=0").code == 0
    finding = check("--data.max_length=99999", "--force", code=3)["validation-too-short"]
    assert "99,999" in finding["message"]
