"""What the data have, known before a run prepares them and exact after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_data_that_end_early_are_reported_with_the_step(check: Check, shell: Shell) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    rows = sum(check()["data"]["fields"]["buckets"].values())
    finding = check("--training.max_steps=9999999", "--data.on_exhaustion=halt")
    assert f"step {rows // 2:,} of" in finding["data-end-early"]["message"]


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(check: Check, shell: Shell) -> None:
    assert shell("run", "config.toml", "-q").code == 0
    assert "257" in check("--model.vocab_size=200", "--force", code=2)["vocabulary-too-small"]["message"]


def test_a_validation_split_that_is_too_short_is_an_error(check: Check, shell: Shell, here: Path) -> None:
    (here / "config.toml").write_text(CONFIG.replace("max_length = 32", "max_length = 31"))
    assert shell("run", "config.toml", "-q", "--training.eval_steps=0").code == 0
    finding = check("--data.max_length=99999", "--force", code=3)["validation-too-short"]
    assert "99,999" in finding["message"]
