"""Whatever is in a file, a variable or an option: a configuration comes out, or a ConfigError with a line a mistake."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt_simple.config.load import RawConfig, read, split_overrides
from gpt_simple.config.parse_toml import parse_toml
from gpt_simple.config.render import to_json, to_toml, to_yaml
from gpt_simple.config.schema import Config, PluginsConfig
from gpt_simple.config.structure import SECTIONS, structure
from gpt_simple.config.types import fields_of
from gpt_simple.errors import ConfigError

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

KEYS = st.sampled_from([f"{name}.{spec.name}" for name, cls in SECTIONS.items() for spec in fields_of(cls)])
WORDS = st.one_of(
    st.sampled_from(["true", "False", "null", "None", ".5", "1e-4", "nan", "-inf", "0x10", "[1]", "{a=1}", "07", "no"]),
    st.sampled_from(
        ['"""', "'''", "= 1", "[[a]]", "\n[model]\n", "#", "\\u0000", "2024-01-01", "1_0", "&a *a", "!!int x"]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(repr),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SOURCES = [to_toml(Config()), to_yaml(Config()), to_json(Config())]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_config_errors(path: str | None, **sources: object) -> Config | None:
    try:
        raw = read(path, **{"environ": {}, **sources})  # type: ignore[arg-type]
        assert isinstance(raw, RawConfig)
        return structure(raw)
    except ConfigError as error:
        message = str(error)
    assert all(line.strip() for line in message.split("\n"))
    message.encode()
    return None


@quick
@given(text=st.text(), suffix=st.sampled_from([".toml", ".yaml", ".json"]))
@example(text="a = " + "[" * 3000, suffix=".toml")
@example(text="- " * 3000, suffix=".yaml")
@example(text="9" * 5000, suffix=".yaml")
@example(text="a = " + "9" * 5000, suffix=".toml")
@example(text='{"a": ' + "9" * 5000 + "}", suffix=".json")
@example(text='["\\ud800"]', suffix=".json")
@example(text='"\\ud800": 1', suffix=".yaml")
@example(text="a = 1\x1c\nb = True", suffix=".toml")
@example(text="a: 1\u2028b", suffix=".toml")
def test_any_text(folder, text, suffix):
    (folder / f"c{suffix}").write_bytes(text.encode("utf-8", "surrogatepass"))
    only_config_errors(f"c{suffix}")


@quick
@given(data=st.data(), index=st.integers(0, 2))
def test_a_valid_file_with_damage(folder, data, index):
    text = SOURCES[index]
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 30)))
    path = folder / f"c{['.toml', '.yaml', '.json'][index]}"
    path.write_bytes((text[:start] + data.draw(WORDS) + text[stop:]).encode("utf-8", "surrogatepass"))
    only_config_errors(path.name)


@quick
@given(st.lists(st.tuples(KEYS, WORDS), max_size=6))
def test_lines_of_known_keys_with_any_value(folder, pairs):
    for suffix, form in ((".toml", "{} = {}"), (".yaml", "{}: {}")):
        (folder / f"c{suffix}").write_bytes(
            "\n".join(form.format(*pair) for pair in pairs).encode("utf-8", "surrogatepass")
        )
        only_config_errors(f"c{suffix}")


@quick
@given(st.dictionaries(st.sampled_from([*SECTIONS, "plugins", "x"]), VALUES))
@example({"plugins": {"a\ud800": {}}})
@example({"plugins": {"tables": {"x": 1}}})
def test_any_document(folder, document):
    (folder / "c.json").write_text(json.dumps(document))
    (folder / "c.yaml").write_text(yaml.safe_dump(document))
    found = only_config_errors("c.json")
    only_config_errors(None, sections=document)
    if found is not None:
        (folder / "again.toml").write_text(to_toml(found), encoding="utf-8", errors="surrogatepass")
        assert structure(read("again.toml", environ={})).training == found.training


@quick
@given(
    st.lists(st.tuples(KEYS | st.text(string.ascii_letters + "._[]0", min_size=1), WORDS | st.text()), max_size=5),
    st.dictionaries(st.text(string.ascii_uppercase + "_", max_size=12).map("GPT_SIMPLE__".__add__), WORDS, max_size=3),
)
@example([("training.seed", "1"), ("training.seed.x", "2"), ("training", "3"), ("training.seed", "4")], {})
def test_any_overrides(overrides, environ):
    only_config_errors(None, overrides=overrides, environ=environ)


@quick
@given(st.lists(st.text(max_size=10) | KEYS.map("--".__add__), max_size=6))
def test_any_command_line(arguments):
    try:
        overrides, rest = split_overrides(arguments)
    except ConfigError:
        return
    assert all("." in key for key, _ in overrides)
    assert len(rest) + len(overrides) <= len(arguments) <= len(rest) + 2 * len(overrides)


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=6), VALUES, max_size=5))
def test_every_key_of_a_toml_document_has_its_line(document):
    text = to_toml(Config(plugins=PluginsConfig(tables={"p": document})))
    parsed = parse_toml(text, "c.toml")
    assert parsed.values is not None
    first = parsed.lines["plugins.p"] + 1
    assert [parsed.lines[f"plugins.p.{key}"] for key in document] == list(range(first, first + len(document)))
    assert text.count("\n") == first + len(document) - 1
