"""Bad input: one clear error, its own exit code, no traceback, and nothing created or deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import CONFIG, Shell


def snapshot(directory: Path) -> list[tuple[str, bytes]]:
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in directory.rglob("*"))


CASES = {
    "unknown key": (["--training.max_step", "5"], 2, ["training.max_step", "max_steps"]),
    "unknown section": (["--trainig.max_steps", "5"], 2, ["trainig", "training"]),
    "key of another section": (["--training.learning_rate", "1"], 2, ["optimizer.learning_rate"]),
    "text for a boolean": (["--training.compile", "maybe"], 2, ["training.compile", "boolean"]),
    "fraction for an integer": (["--training.max_steps", "1000.7"], 2, ["training.max_steps", "integer", "1000.7"]),
    "out of bounds": (["--optimizer.beta1", "1.5"], 2, ["optimizer.beta1"]),
    "heads do not divide": (["--model.n_head", "5"], 2, ["n_head", "n_embd"]),
    "fp16 on a CPU": (["--training.mixed_precision", "fp16"], 2, ["fp16", "CPU"]),
    "unknown model": (["--model.name", "gtp"], 2, ["gtp", "'gpt'"]),
    "unknown schedule": (["--optimizer.schedule", "cosin"], 2, ["cosin", "cosine"]),
    "unknown optimizer": (["--optimizer.name", "adam"], 2, ["adamw"]),
    "unknown source": (["--data.source", "story"], 2, ["story", "stories"]),
    "unknown tokenizer": (["--data.tokenizer", "gpt2"], 2, ["gpt2", "tokenizer"]),
    "missing data path": (["--data.source=files", "--data.path=nowhere"], 3, ["nowhere"]),
    "no data path": (["--data.source=files"], 3, ["data.path"]),
    "empty data path": (["--data.source=files", "--data.path=empty"], 3, ["empty"]),
    "not UTF-8": (["--data.source=files", "--data.path=latin1.txt"], 3, ["latin1.txt", "UTF-8"]),
    "no validation": (["--data.source=files", "--data.path=short.txt"], 3, ["val_fraction"]),
    "output is a file": (["--training.output_dir", "config.toml"], 2, ["output_dir"]),
    "output below a file": (["--training.output_dir", "config.toml/out"], 2, ["output_dir"]),
    "unknown plugin": (["-p", "consol"], 2, ["consol", "console"]),
    "unknown plugin table": (["--plugins.sampl.seed", "1"], 2, ["sampl"]),
    "unknown plugin key": (["--plugins.sample.sed", "1"], 2, ["plugins.sample.sed", "seed"]),
    "missing checkpoint": (["--training.resume", "nothing/here"], 4, ["nothing/here"]),
    "reserve above the budget": (
        ["--training.max_runtime_seconds=5", "--training.walltime_reserve_seconds=10"],
        2,
        ["walltime_reserve_seconds"],
    ),
    "two configurations": (["--config", "other.toml"], 2, ["two configurations"]),
    "missing value": (["--training.max_steps"], 2, ["training.max_steps"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error_and_nothing_changed(shell: Shell, here: Path, case: str) -> None:
    arguments, code, words = CASES[case]
    (here / "empty").mkdir()
    (here / "latin1.txt").write_bytes("café".encode("latin-1") * 100)
    (here / "short.txt").write_text("too short to share")
    before = snapshot(here)
    ended = shell("run", "config.toml", *arguments)
    assert ended.code == code, ended.err
    for word in words:
        assert word in ended.err, ended.err
    assert "Traceback" not in ended.err + ended.out
    assert snapshot(here) == before


def test_all_errors_of_a_file_come_at_once_with_their_lines(shell: Shell, here: Path) -> None:
    (here / "bad.yaml").write_text(
        "training:\n  max_step: 5\n  compile: 'false'\n  max_steps: 1000.7\n"
        "optimizer:\n  learning_rate: 1e-4\n  beta1: two\n"
    )
    ended = shell("run", "bad.yaml")
    assert ended.code == 2
    for place in ("bad.yaml:2", "bad.yaml:3", "bad.yaml:4", "bad.yaml:7"):
        assert place in ended.err
    assert "bad.yaml:6" not in ended.err, "1e-4 is a number in YAML 1.2"


def test_unknown_plugins_and_components_do_not_hide_other_errors(shell: Shell, here: Path) -> None:
    (here / "bad.toml").write_text(
        '[model]\nname = "gtp"\n[optimizer]\nschedule = "cosin"\n[training]\nmax_step = 5\n[plugins.consle]\n'
    )
    first = shell("run", "bad.toml")
    assert first.code == 2
    assert "bad.toml:6" in first.err
    assert "consle" in first.err
    second = shell("run", "bad.toml", "--plugins.sample.seed", "1", "-p", "no:sample")
    assert "consle" in second.err
    (here / "bad.toml").write_text((here / "bad.toml").read_text().replace("[plugins.consle]", ""))
    third = shell("run", "bad.toml")
    assert [word in third.err for word in ("bad.toml:2", "bad.toml:4", "bad.toml:6")] == [True] * 3


def test_a_missing_configuration(shell: Shell) -> None:
    assert shell("run", "missing.toml").code == 2
    assert shell("run").code == 2


def test_a_syntax_error_names_line_and_column(shell: Shell, here: Path) -> None:
    (here / "broken.toml").write_text(CONFIG.replace("compile = false", "compile = False"))
    ended = shell("run", "broken.toml")
    assert ended.code == 2
    assert "broken.toml:16" in ended.err
    assert "false" in ended.err


def test_an_unknown_command_is_met_with_a_suggestion(shell: Shell) -> None:
    ended = shell("rum")
    assert ended.code == 2
    assert "'run'" in ended.err


def test_data_that_are_refused_are_told_with_the_line_of_their_key(shell: Shell, here: Path) -> None:
    (here / "data").mkdir()
    (here / "c.yaml").write_text("training: {compile: false}\ndata:\n  path: data\n  source: shards\n")
    assert shell("run", "c.yaml").err.startswith("error: c.yaml:3 (data.path) data: there is no dataset.json")
    assert shell("run", "--data.source=files").err.startswith("error: data.path")
