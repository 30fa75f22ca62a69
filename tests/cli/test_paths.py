"""Every argument, option and field that names a path: ``~`` is the home directory, and empty text is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_simple.config.schema import Config
from gpt_simple.spec import resolve_spec
from tests.conftest import Shell

FIELDS = ("data.path", "data.tokenizer", "training.output_dir", "training.resume")
COMMANDS = {
    "status": ["status", "PATH"],
    "stop": ["stop", "PATH"],
    "sample": ["sample", "PATH"],
    "report": ["report", "PATH"],
    "report -o": ["report", "there", "-o", "PATH"],
    "data inspect": ["data", "inspect", "PATH"],
    "init": ["init", "-o", "PATH"],
    "plugins new": ["plugins", "new", "mine", "--directory", "PATH"],
    "tokenize input": ["tokenize", "--input_dir", "PATH", "--output_dir", "out"],
    "tokenize output": ["tokenize", "--input_dir", "there", "--output_dir", "PATH"],
    "tokenize tokenizer": ["tokenize", "--input_dir", "there", "--output_dir", "out", "--tokenizer", "PATH"],
}

NO_PATHS = [
    ("", 'got ""'),
    ("~nobody-here/x", "no home directory ~nobody-here"),
    pytest.param("x" * 300, "no file can have this name: File name too long", id="long name"),
    pytest.param("x/" * 2500, "no file can have this name: File name too long", id="long path"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def value(config: Config, field: str) -> object:
    section, name = field.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("field", FIELDS)
def test_home_is_resolved_in_every_field(home: Path, field: str) -> None:
    assert value(resolve_spec(None, overrides=[(field, "~/x")]).config, field) == str(home / "x")


def test_home_is_resolved_in_a_list_of_paths(home: Path) -> None:
    config = resolve_spec(None, sections={"data": {"path": ["~/x", "y"]}}).config
    assert config.data.path == (str(home / "x"), "y")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("text", "message"), NO_PATHS)
def test_what_is_no_path_is_an_error_in_every_field(shell: Shell, field: str, text: str, message: str) -> None:
    ended = shell("run", "config.toml", f"--{field}", text)
    assert (ended.code, message in ended.err, f"--{field}" in ended.err) == (2, True, True), ended.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("text", "message"), NO_PATHS)
def test_what_is_no_path_is_an_error_in_commands(
    shell: Shell, here: Path, command: str, text: str, message: str
) -> None:
    before = sorted(here.rglob("*"))
    ended = shell(*(text if word == "PATH" else word for word in COMMANDS[command]))
    assert (ended.code, message in ended.err) == (2, True), ended.err
    assert sorted(here.rglob("*")) == before


def test_a_new_file_and_a_new_folder_are_made_at_home(shell: Shell, here: Path, home: Path) -> None:
    home.mkdir()
    assert shell("init", "-o", "~/mine.toml").code == 0
    assert shell("plugins", "new", "mine", "--directory=~/code").code == 0
    assert {path.name for path in home.iterdir()} == {"mine.toml", "code"}
    assert shell("config", "show", "~/mine.toml").code == 0
    assert not (here / "~").exists()


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2500], ids=["long name", "long path"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ["run", "PATH"]),
        (2, ["validate", "PATH"]),
        (2, ["config", "show", "PATH"]),
        (2, ["run", "config.toml", "-p", "./PATH.py"]),
        (3, ["run", "config.toml"]),
        (3, ["run", "config.toml", "-p", "no:validate"]),
        (3, ["validate", "config.toml"]),
    ],
    ids=str,
)
def test_a_name_that_no_file_can_have_is_no_defect(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: list[str], name: str
) -> None:
    if code == 3:
        monkeypatch.setenv("GPT_SIMPLE_CACHE", f"/tmp/{name}")
    ended = shell(*(word.replace("PATH", name) for word in words))
    assert (ended.code, "Traceback" in ended.err, "failed in" in ended.err) == (code, False, False), ended.err


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_home_that_cannot_be_found_is_no_defect(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("GPT_SIMPLE_CACHE")
    monkeypatch.setattr("posixpath.expanduser", lambda path: path)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    ended = shell(command, "config.toml")
    words = " ".join((ended.err + ended.out).split())  # a table has lines of the terminal's width
    assert (ended.code, "set GPT_SIMPLE_CACHE to a directory" in words) == (3, True), words
