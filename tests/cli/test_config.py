"""`gpt-simple config` and `init`, and the fields of the configuration as options."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from gpt_simple.cli.fields import ConfiguredCommand, builtin_configs, complete, option_help
from gpt_simple.cli.init import PRESETS
from gpt_simple.cli.main import main
from gpt_simple.config.load import read
from gpt_simple.config.structure import SECTIONS, structure
from gpt_simple.config.types import fields_of
from gpt_simple.plugin_host.discovery import installed, usable
from tests.packages import PLUGIN


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == code
        return capsys.readouterr()

    return run


def test_show_says_where_every_value_comes_from(cli, monkeypatch):
    Path("c.toml").write_text("[training]\nseed = 1\nmax_steps = 5\n[plugins.sample]\ntop_k = 3\n")
    monkeypatch.setenv("GPT_SIMPLE__TRAINING__SEED", "2")
    out, _ = cli("config", "show", "c.toml", "--origin", "--training.seed=3")
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert {
        "seed = 3 # --training.seed, overrides $GPT_SIMPLE__TRAINING__SEED, overrides c.toml:2",
        "max_steps = 5 # c.toml:3",
        "top_k = 3 # c.toml:5",
        "learning_rate = 0.0003 # default",
    } <= lines


def test_show_in_both_formats_is_the_configuration_itself(cli):
    Path("c.yaml").write_text("training: {seed: 1, keep_last_k: null}\n")
    written = json.loads(cli("config", "show", "--config", "c.yaml", "--json")[0])
    assert written["training"]["seed"] == 1
    assert written["training"]["keep_last_k"] is None
    shown = tomli.loads(cli("config", "show", "c.yaml", "--toml")[0])
    assert shown["training"]["keep_last_k"] == "null"
    assert shown["plugins"]["sample"] == written["plugins"]["sample"]
    places = json.loads(cli("config", "show", "c.yaml", "--json", "--origin", "--training.seed", "2")[0])
    assert places["training.seed"] == {"value": 2, "kind": "cli", "places": ["--training.seed", "c.yaml:1"]}
    assert places["training.max_steps"] == {"value": 1000, "kind": "default", "places": ["default"]}
    assert "plugins.sample.top_k" in places


def test_show_reports_mistakes_and_translated_keys(cli):
    Path("c.yaml").write_text("model: {attention_mode: causal}\ntraining: {max_step: 1}\n")
    _, err = cli("config", "show", "c.yaml", code=2)
    assert err == "error: c.yaml:2: training.max_step: unknown key; did you mean training.max_steps?\n"
    _, err = cli("config", "show", "missing.toml", code=2)
    assert "missing.toml: the configuration cannot be read" in err
    Path("c.yaml").write_text("model: {attention_mode: causal}\n")
    _, err = cli("config", "show", "c.yaml")
    assert err.startswith("note: c.yaml:1: model.attention_mode causal is read as data.document_mask false")


def test_schema_covers_the_built_in_plugins(cli):
    schema = json.loads(cli("config", "schema")[0])
    assert set(schema["properties"]) == {"model", "data", "optimizer", "training", "plugins"}
    assert set(builtin_configs()) <= set(schema["properties"]["plugins"]["properties"])
    Path("c.toml").write_text("[plugins.sample]\nseed = 1\n")
    assert json.loads(cli("config", "schema", "--config", "c.toml")[0]) == schema


def test_schema_has_no_other_plugin_with_no_plugins(cli, fake_package):
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": PLUGIN.format(cls="Acme")})
    Path("c.toml").write_text("[plugins.acme]\n")

    def plugins(*options: str) -> set[str]:
        return set(
            json.loads(cli("config", "schema", "-c", "c.toml", *options)[0])["properties"]["plugins"]["properties"]
        )

    assert "acme" in plugins()
    assert "acme" not in plugins("--no-plugins")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
def test_a_preset_reads_back_to_itself(cli, preset, suffix):
    out, _ = cli("init", "--preset", preset, "-o", f"c{suffix}")
    assert f"gpt-simple run c{suffix}" in out
    wanted = structure(read(None, environ={}, sections=PRESETS[preset]))
    raw = read(f"c{suffix}", environ={})
    assert structure(raw, plugin_configs=builtin_configs()) == structure(
        read(None, environ={}, sections=PRESETS[preset]), plugin_configs=builtin_configs()
    )
    assert structure(raw).training == wanted.training
    for name, section in PRESETS[preset].items():
        assert not any(raw.origins.is_default(f"{name}.{key}") for key in section)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_a_preset_with_every_key_written_out_is_the_same(cli, preset, suffix):
    cli("init", "--preset", preset, "-o", f"c{suffix}")
    everything = Path(f"all{suffix}")
    everything.write_text(re.sub(r"^( *)#(?! )", r"\1", Path(f"c{suffix}").read_text(), flags=re.MULTILINE))
    raw = read(everything, environ={})
    for name, cls in SECTIONS.items():
        assert not any(raw.origins.is_default(f"{name}.{spec.name}") for spec in fields_of(cls))
    assert cli("config", "show", str(everything), "--json") == cli("config", "show", f"c{suffix}", "--json")


def test_the_preset_for_own_text_suits_a_few_megabytes(cli):
    Path("data").mkdir()
    for index in range(20):
        Path(f"data/{index}.txt").write_text(f"This is a text of one's own, the one with number {index}.\n" * 2000)
    cli("init", "--preset", "cpu")
    cli("validate", "config.toml", "--strict")


@pytest.mark.parametrize("word", ["null", "none"])
def test_no_source_can_be_written_as_a_word_everywhere(cli, monkeypatch, word):
    plain = cli("config", "show")[0]
    assert cli("config", "show", "--data.source", word)[0] == plain
    monkeypatch.setenv("GPT_SIMPLE__DATA__SOURCE", word)
    assert cli("config", "show")[0] == plain
    assert "there is no model 'null'" in cli("config", "show", "--model.name", "null", code=2)[1]


def test_init_never_overwrites_by_itself(cli):
    Path("config.toml").write_text("precious")
    _, err = cli("init", code=2)
    assert "config.toml exists already" in err
    assert Path("config.toml").read_text() == "precious"
    cli("init", "--force")
    assert Path("config.toml").read_text() != "precious"
    _, err = cli("init", "-o", "config.ini", code=2)
    assert "a configuration is a .toml" in err
    _, err = cli("init", "-o", "no/such/folder.toml", code=2)
    assert "the file cannot be written" in err


def test_help_and_completion_have_every_field():
    plugins = builtin_configs()
    text = option_help()
    keys = [f"--{name}.{spec.name}" for name, cls in SECTIONS.items() for spec in fields_of(cls)]
    keys += [f"--plugins.{name}.{spec.name}" for name, cls in plugins.items() for spec in fields_of(cls)]
    assert all(f"  {key}  " in text or f"  {key}\n" in text for key in keys)
    assert set(keys) <= {item.value for item in complete("--")}
    assert [item.value for item in complete("--training.max_st")] == ["--training.max_steps"]
    assert complete("train") == []


def test_completion_survives_an_option_without_its_value():
    command = ConfiguredCommand("run", params=[])
    context = command.make_context("run", ["--training.seed"], resilient_parsing=True)
    assert "--training.seed" in [item.value for item in command.shell_complete(context, "--training.s")]


def test_a_shell_gets_dotted_keys(cli, monkeypatch):
    monkeypatch.setenv("_GPT_SIMPLE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "gpt-simple config show c.toml --training.seed 3 --plugins.sample.t")
    monkeypatch.setenv("COMP_CWORD", "6")
    assert cli()[0].split() == ["plain,--plugins.sample.temperature", "plain,--plugins.sample.top_k"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("run c.toml --model.norm r", {"plain,rmsnorm"}),
        ("run c.toml --training.seed 3 --data.source s", {"plain,shards", "plain,stories"}),
        ("config show c.toml --training.compile ", {"plain,true", "plain,false"}),
        ("validate c.toml --plugins.console.progress li", {"plain,live", "plain,lines"}),
        ("run c.toml --data.path co", {"file,co"}),
        ("run con", {"file,con"}),
        ("run --training.compile_scope ", {"plain,model", "plain,blocks"}),
        ("train --config c.yaml --training.compile_scope m", {"plain,model"}),
        ("train --config c.yaml --training.compile_scope = m", {"plain,model"}),
        (
            "run --training.compile_scope=",
            {"plain,--training.compile_scope=model", "plain,--training.compile_scope=blocks"},
        ),
        ("run c.toml --model.norm=r", {"plain,--model.norm=rmsnorm"}),
        ("run --training.seed 3 con", {"file,con"}),
        ("run -p eval", {"plain,evaluate"}),
        ("config show c.toml -p no:eval", {"plain,no:evaluate"}),
        ("validate -p ./mine", {"file,./mine"}),
        ("run -p no : eval", {"plain,evaluate"}),
        ("run c.toml -p no :", {f"plain,{name}" for name in usable(installed())}),
        ("run -c con", {"file,con"}),
    ],
)
def test_a_shell_gets_values_and_files(cli, monkeypatch, words, wanted):
    monkeypatch.setenv("_GPT_SIMPLE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"gpt-simple {words}")
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ") + 1))
    assert set(cli()[0].split()) == wanted


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model.name", "3", "there is no model '3'; expected one of gpt"),
        ("data.source", "07:32:00", "there is no source '07:32:00'"),
        ("optimizer.name", "true", "there is no optimizer 'true'"),
        ("data.tokenizer", "1e3", "there is no tokenizer '1e3'; expected one of bpe, bytes, or the path"),
        ("data.tokenizer", "x" * 10_000, "no file can have this name"),
    ],
)
def test_an_unknown_component_is_reported_whatever_its_name(cli, key, value, reason):
    _, err = cli("config", "show", f"--{key}", value, code=2)
    assert err.startswith(f"error: --{key}: {reason}")


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--max_steps", "there is no option --max_steps; did you mean --training.max_steps?"),
        ("--max-steps=3", "did you mean --training.max_steps?"),
        ("--lr", "did you mean --optimizer.learning_rate?"),
        ("--batch_size", "did you mean --training.per_device_batch_size?"),
        ("--seed", "did you mean --data.seed or --training.seed or --plugins.sample.seed?"),
        ("--origins", "--origin"),
    ],
)
def test_an_option_without_its_section_gets_a_suggestion(cli, option, meant):
    _, err = cli("config", "show", option, "5", code=2)
    assert meant in err


COMPONENTS = """
from attrs import frozen
from gpt_simple import Plugin, hookimpl

@frozen
class BigramConfig:
    name: str = "bigram"
    width: int = 8

class Parts(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("model", "bigram", "nowhere:build", config=BigramConfig)
"""


def test_show_and_schema_include_the_components_of_a_plugin(cli):
    Path("parts.py").write_text(COMPONENTS)
    Path("c.toml").write_text('[model]\nname = "bigram"\nwidth = 4\n')
    assert tomli.loads(cli("config", "show", "c.toml", "-p", "./parts.py")[0])["model"] == {
        "name": "bigram",
        "width": 4,
    }
    schema = json.loads(cli("config", "schema", "-c", "c.toml", "-p", "./parts.py")[0])
    assert set(schema["properties"]["model"]["properties"]) == {"name", "width"}
    assert "there is no model 'bigram'" in cli("config", "show", "c.toml", code=2)[1]


def test_the_commands_do_not_import_torch(tmp_path):
    code = """if True:
        import sys
        from gpt_simple.cli.main import main
        for arguments in (["config", "show"], ["config", "schema"], ["init"]):
            try:
                main(arguments)
            except SystemExit as leave:
                assert leave.code == 0, arguments
        heavy = {"torch", "accelerate", "numpy", "rich"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
