"""Bad input: one clear error, its own exit code, no traceback, and nothing created or deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_simple.cli.main import main
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


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize("key", ["data.path", "data.tokenizer", "plugins.\x1b[31m.x"])
def test_no_value_acts_on_the_terminal(shell: Shell, here: Path, command: str, key: str) -> None:
    ended = shell(command, "config.toml", f"--{key}=\x1b]0;title\x07", "--data.source=files")
    assert ended.code != 0
    assert r"\x1b" in ended.out + ended.err
    assert all(line.isprintable() for line in (ended.out + ended.err).splitlines())


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


EVERYTHING = """\
[model]
name = "gtp"
n_layers = 2
[optimizer]
schedule = "cosin"
[data]
source = "storiez"
tokenizer = "bytez"
[training]
max_step = 5
[plugins.consle]
[plugins.console]
progres = "lines"
[plugins]
require = ["memory"]
"""


@pytest.mark.parametrize("command", ["run", "validate"])
def test_no_mistake_hides_another(shell: Shell, here: Path, command: str) -> None:
    (here / "bad.toml").write_text(EVERYTHING)
    (here / "broken.py").write_text("import no_such_module\n")
    ended = shell(command, "bad.toml", "-p", "./broken.py", "--plugins.broken.x=1")
    assert ended.code == 5, "a plugin's defect is the worst class"
    words = [f"bad.toml:{line}" for line in (2, 3, 5, 7, 8, 10, 11, 13, 15)]
    said = " ".join((ended.out + ended.err).split())  # a table is wrapped
    for word in [*words, "did you mean 'bytes'?", "No module named 'no_such_module'"]:
        assert word in said
    assert "'broken' is installed" not in said


def test_a_plugin_that_fails_in_its_check_hides_nothing(shell: Shell, here: Path) -> None:
    hook = "    @hookimpl\n    def check_config(self, config):\n        raise ValueError('boom')\n"
    (here / "bad.py").write_text(f"from gpt_simple import Plugin, hookimpl\nclass Bad(Plugin):\n{hook}")
    (here / "afile").touch()
    for command in ("run", "validate"):
        ended = shell(command, "config.toml", "-p", "./bad.py", "--training.output_dir=afile")
        assert ended.code == 5
        assert "ValueError: boom" in ended.out + ended.err
        assert "afile" in ended.out + ended.err


def test_validate_goes_on_without_a_plugin_that_cannot_be_used(shell: Shell, here: Path) -> None:
    (here / "broken.py").write_text("import no_such_module\n")
    ended = shell("validate", "config.toml", "-p", "./broken.py", "--data.path=nowhere", "--data.source=files")
    assert ended.code == 5
    assert "no_such_module" in ended.out
    assert "nowhere" in ended.out


SECRETIVE = """\
from attrs import frozen
from gpt_simple import Finding, Plugin, hookimpl

@frozen
class Settings:
    api_key: str = ""
    token: int = 3

class Secretive(Plugin[Settings]):
    Config = Settings
    {hook}
"""


@pytest.mark.parametrize(
    "table",
    ["api_key = ['sekret9']", "token = 'sekret9'", "api_key = 'sekret9' foo", "api_key = sekret9", "api_key: sekret9"],
)
def test_a_secret_is_not_shown_where_it_is_wrong(shell: Shell, here: Path, table: str) -> None:
    (here / "secretive.py").write_text(SECRETIVE.format(hook=""))
    (here / "bad.toml").write_text(f"{CONFIG}[plugins.secretive]\n{table}\n")
    ended = shell("run", "bad.toml", "-p", "./secretive.py")
    assert ended.code == 2
    assert f"bad.toml:{2 + CONFIG.count(chr(10))}" in ended.err
    assert "not shown" in ended.err
    assert "sekret" not in ended.err


@pytest.mark.parametrize("hook", ["__init__", "check_config"])
def test_a_secret_is_not_shown_by_a_plugin_that_fails(shell: Shell, here: Path, hook: str) -> None:
    marker = "" if hook == "__init__" else "@hookimpl\n    "
    body = f"{marker}def {hook}(self, config): raise ValueError('no such key: ' + "
    body += "config.api_key)" if hook == "__init__" else "self.config.api_key)"
    (here / "secretive.py").write_text(SECRETIVE.format(hook=body))
    for command in ("run", "validate"):
        ended = shell(command, "config.toml", "-p", "./secretive.py", "--plugins.secretive.api_key=sekret9")
        assert ended.code == 5
        assert "no such key: (redacted)" in ended.out + ended.err
        assert "sekret" not in ended.out + ended.err


def test_the_command_to_go_on_shows_no_secret(shell: Shell, here: Path) -> None:
    (here / "secretive.py").write_text(SECRETIVE.format(hook=""))
    out = shell("run", "config.toml", "-p", "./secretive.py", "--plugins.secretive.api_key=sekret9").out
    assert "--plugins.secretive.api_key '(redacted)'" in out
    assert "sekret" not in out + (here / "out/summary.json").read_text()


def test_a_secret_is_in_no_file_of_the_run(shell: Shell, here: Path) -> None:
    (here / "secretive.py").write_text(SECRETIVE.format(hook=""))
    assert shell("run", "config.toml", "-p", "./secretive.py", "--plugins.secretive.api_key=sekret9").code == 0
    assert [path for path, content in snapshot(here / "out") if b"sekret9" in content] == []
    facts = json.loads((here / "out/run.json").read_text())["facts"]
    assert facts["config"]["plugins.tables.secretive.api_key"] == "(redacted)"


LEAKS = {
    "log line": ("main", "abort", "on_step_end", "run.log.warning(f'at {key}', at=[{'x': key}], error=OSError(key))"),
    "switched off": ("main", "disable", "on_step_end", "raise OSError(key)"),
    "abort": ("main", "abort", "on_step_end", "raise OSError(key)"),
    "before the claim": ("main", "abort", "check_runtime", "raise OSError(key)"),
    "while it is built": ("main", "abort", "on_model_built", "raise OSError(key)"),
    "stop": ("main", "abort", "on_step_end", "run.control.stop(key)"),
    "halt": ("main", "abort", "on_step_end", "run.control.halt(key)"),
    "on_close": ("main", "abort", "on_close", "raise OSError(key)"),
}
LEAKY = """\
from attrs import frozen
from gpt_simple import Plugin, hookimpl

@frozen
class Settings:
    api_key: str = ""

class Leaky(Plugin[Settings]):
    Config = Settings
    ranks, on_error = {ranks!r}, {policy!r}

    def describe(self):
        return {{"at": [self.config.api_key]}}

    @hookimpl
    def {hook}(self, run):
        key = self.config.api_key
        {body}

    @hookimpl
    def on_run_error(self, run, event):
        run.log.error(f"{{event.error!r}} of {{event.error.__cause__!r}}")
"""


@pytest.mark.parametrize("leak", LEAKS)
def test_no_output_of_a_run_shows_a_secret(shell: Shell, here: Path, leak: str) -> None:
    ranks, policy, hook, body = LEAKS[leak]
    (here / "leaky.py").write_text(LEAKY.format(ranks=ranks, policy=policy, hook=hook, body=body))
    ended = shell("run", "config.toml", "-p", "./leaky.py", "--plugins.leaky.api_key=sekret9")
    outputs = {"out": ended.out, "err": ended.err, **{name: str(content) for name, content in snapshot(here / "out")}}
    assert [name for name, text in outputs.items() if "sekret9" in text] == []
    assert any("(redacted)" in text for text in outputs.values())


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


def test_refused_data_are_reported_with_the_line_of_their_key(shell: Shell, here: Path) -> None:
    (here / "data").mkdir()
    (here / "c.yaml").write_text("training: {compile: false}\ndata:\n  path: data\n  source: shards\n")
    assert shell("run", "c.yaml").err.startswith("error: c.yaml:3: data.path: data: there is no dataset.json")
    assert shell("run", "--data.source=files").err.startswith("error: data.path")


def test_a_failure_at_the_end_of_a_file_is_no_ctrl_c(shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise EOFError("the file has ended")

    monkeypatch.setattr("gpt_simple.cli.status.read_status", fail)
    with pytest.raises(EOFError, match="the file has ended"):
        main(["status", "out"])


def test_a_key_of_a_thousand_parts_is_refused(shell: Shell) -> None:
    ended = shell("config", "show", f"--{'a.' * 1000}b=1")
    assert ended.code == 2
    assert "more than 50 parts" in ended.err
