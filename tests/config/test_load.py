"""Reading: formats, precedence, origins."""

from __future__ import annotations

import timeit

import pytest

from gpt_simple import DataConfig, ModelConfig, TrainingConfig
from gpt_simple.config.load import read, sections_of, split_overrides
from gpt_simple.config.render import to_toml
from gpt_simple.config.schema import Config, Phase, PluginsConfig
from gpt_simple.config.structure import structure
from gpt_simple.errors import ConfigError

TOML = """
[training]
max_steps = 5000        # a comment
compile = false
[optimizer]
learning_rate = 1e-4
[[data.curriculum]]
duration_tokens = 1_000
mix = {web = 0.5, "a b" = 0.5}
"""
YAML = """
training:
  max_steps: 5000
  compile: false
optimizer:
  learning_rate: 1e-4
data:
  curriculum:
    - duration_tokens: 1_000
      mix: {web: 0.5, a b: 0.5}
"""
JSON = """{
\t"training": {"max_steps": 5000, "compile": false},
\t"optimizer": {"learning_rate": 1e-4},
\t"data": {"curriculum": [{"duration_tokens": 1000, "mix": {"web": 0.5, "a b": 0.5}}]}
}"""


@pytest.mark.parametrize(("suffix", "text"), [(".toml", TOML), (".yaml", YAML), (".yml", YAML), (".json", JSON)])
def test_the_three_formats_say_the_same(bench, suffix, text):
    config = bench.config(text, suffix)
    assert config.training == TrainingConfig(max_steps=5000, compile=False)
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.curriculum == (Phase(1000, {"web": 0.5, "a b": 0.5}),)
    assert config.model == ModelConfig()


def test_no_file_and_an_empty_file_are_the_defaults(bench):
    assert structure(read(None, environ={})) == Config()
    for suffix in (".toml", ".yaml"):
        assert bench.config("", suffix) == Config()
    assert bench.raw("plugins:\nmodel: ~\n", ".yaml").values == {"plugins": {}, "model": {}}


def test_precedence_and_origins(bench):
    raw = bench.raw(
        "[training]\nseed = 1\nmax_steps = 2\nsave_steps = 3\n",
        environ={"GPT_SIMPLE__TRAINING__SEED": "10", "GPT_SIMPLE__TRAINING__MAX_STEPS": "20", "HOME": "/"},
        overrides=[("training.seed", "99"), ("training.seed", "100")],
    )
    config = structure(raw)
    assert (config.training.seed, config.training.max_steps, config.training.save_steps) == (100, 20, 3)
    seed = raw.origins.of("training.seed")
    chain = []
    while seed is not None:
        chain.append((seed.kind, seed.where))
        seed = seed.overrides
    assert chain == [
        ("cli", "--training.seed"),
        ("cli", "--training.seed"),
        ("env", "$GPT_SIMPLE__TRAINING__SEED"),
        ("file", "config.toml:2"),
    ]
    assert raw.origins.place("training.save_steps") == "config.toml:4 (training.save_steps)"
    assert raw.origins.place("training.compile") == "training.compile"
    assert raw.origins.is_default("training.compile")
    assert not raw.origins.is_default("training.seed")


def test_plugin_keys_can_be_overridden(bench):
    raw = bench.raw(
        "[plugins.csv]\npath = 'a'\n",
        environ={"GPT_SIMPLE__PLUGINS__CSV__EVERY": "3"},
        overrides=[("plugins.csv.path", "b.csv"), ("plugins.disable", '["console"]')],
    )
    assert structure(raw).plugins == PluginsConfig(("console",), tables={"csv": {"path": "b.csv", "every": 3}})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("training.max_steps", "1e3", 1000),
        ("training.wandb_run_name", "123", "123"),
        ("training.wandb_run_name", "2024-01-01", "2024-01-01"),
        ("training.wandb_run_name", '"null"', None),
        ("training.wandb_run_name", "null", None),
        ("training.output_dir", "none", "none"),
        ("training.output_dir", "a\nseed = 3", "a\nseed = 3"),
        ("training.output_dir", "C:\\runs", "C:\\runs"),
        ("training.keep_last_k", "null", None),
        ("training.keep_last_k", "none", None),
        ("training.mixed_precision", "no", "no"),
        ("training.gradient_checkpointing", "false", False),
        ("training.gradient_checkpointing", "2", 2),
        ("data.path", '["a", "b"]', ("a", "b")),
        ("data.path", "corpus", "corpus"),
        ("data.curriculum", "[{duration_tokens = 5, mix = {a = 1}}]", (Phase(5, {"a": 1.0}),)),
    ],
)
def test_text_becomes_what_the_field_wants(bench, key, text, value):
    section, field = key.split(".")
    for sources in ({"overrides": [(key, text)]}, {"environ": {f"GPT_SIMPLE__{section}__{field}".upper(): text}}):
        found = getattr(getattr(bench.config(**sources), section), field)
        assert (found, type(found)) == (value, type(value))


def test_an_override_of_a_list_forgets_the_lines_of_its_items(bench):
    lines = bench.mistakes(TOML, overrides=[("data.curriculum", "[{duration_tokens = 0, mix = {a = 1}}]")])
    assert lines == ["--data.curriculum: data.curriculum[0].duration_tokens: expected an integer >= 1, got 0"]


def test_sections_given_in_python_replace_the_files_sections(bench):
    raw = bench.raw(
        "[training]\nseed = 1\nmax_steps = 7\n[model]\nn_layer = 3\n",
        sections={"training": TrainingConfig(max_steps=9, compile=True), "data": {"path": ("a", "b")}},
        overrides=[("training.logging_steps", "1")],
    )
    config = structure(raw)
    assert config.training == TrainingConfig(max_steps=9, logging_steps=1)
    assert config.data == DataConfig(path=("a", "b"))
    assert config.model.n_layer == 3
    assert raw.origins.place("training.max_steps") == "train(...) (training.max_steps)"
    assert raw.origins.is_default("training.seed")
    assert raw.origins.is_default("training.compile"), "a default that was not chosen stays a default"


def test_a_config_built_in_python_is_validated_and_equal(bench):
    made = Config(
        training=TrainingConfig(keep_last_k=None),
        data=DataConfig(curriculum=(Phase(10, {"a": 1}),)),
        plugins=PluginsConfig(disable=("x",), tables={"csv": {"path": "p"}}),
    )
    assert structure(read(None, environ={}, sections=sections_of(made))) == made
    wrong = Config(training=TrainingConfig(max_steps=0, compile="false"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        structure(read(None, environ={}, sections=sections_of(wrong)))
    assert len(str(caught.value).splitlines()) == 2


def test_a_value_is_set_if_a_source_has_it_and_it_is_not_null(bench):
    raw = bench.raw("training: {wandb_project: lab, wandb_run_name: null, seed: 0}", ".yaml")
    assert raw.is_set("training.wandb_project")
    assert raw.is_set("training.seed")
    assert not raw.is_set("training.wandb_run_name")
    assert not raw.is_set("training.max_steps")
    assert not bench.raw(overrides=[("training.wandb_project", "none")]).is_set("training.wandb_project")


def test_overrides_are_taken_out_of_a_command_line():
    arguments = ["run", "./a.toml", "--training.seed", "-5", "--config=./b.toml", "--optimizer.eps=1e-8", "-p", "x"]
    assert split_overrides(arguments) == (
        [("training.seed", "-5"), ("optimizer.eps", "1e-8")],
        ["run", "./a.toml", "--config=./b.toml", "-p", "x"],
    )
    assert split_overrides(["--a.b=", "--", "--c.d", "1"]) == ([("a.b", "")], ["--", "--c.d", "1"])


@pytest.mark.parametrize("arguments", [["--training.compile"], ["--training.compile", "--force"]])
def test_an_override_without_a_value_is_named(arguments):
    with pytest.raises(ConfigError, match=r"^--training\.compile: a value is missing"):
        split_overrides(arguments)


def test_files_that_cannot_be_read(bench, tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "config.ini").touch()
    for name, reason in {
        "missing.toml": "No such file",
        ".": "Is a directory|is a .toml",
        "latin.toml": "byte 5 is not UTF-8",
        "deep.json": "nested too deeply",
        "config.ini": "is a .toml, .yaml, .yml or .json file",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            read(name)


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(bench, tmp_path):
    (tmp_path / "w.toml").write_bytes("\ufeff[training]\r\nseed = 7\r\nmax_step = 1\r\n".encode())
    with pytest.raises(ConfigError, match=r"^w\.toml:3: training\.max_step: "):
        structure(read("w.toml", environ={}))


def test_a_full_configuration_is_checked_in_under_5_ms(bench):
    raw = bench.raw(to_toml(Config()))
    assert min(timeit.repeat(lambda: structure(raw), number=1, repeat=5)) < 0.005


@pytest.mark.parametrize("variable", ["GPT_SIMPLE__", "GPT_SIMPLE__MODEL__", "GPT_SIMPLE____MODEL"])
def test_a_variable_that_names_no_key_is_named(bench, variable):
    expected = f"${variable}: expected a name like GPT_SIMPLE__TRAINING__MAX_STEPS"
    assert bench.mistakes("", environ={variable: "3"}) == [expected]


def test_a_variable_that_lacks_an_underscore_is_a_note(bench):
    raw = bench.raw("", environ={"GPT_SIMPLE_MODEL_N_EMBD": "3", "GPT_SIMPLE_CACHE": "x", "GPT_SIMPLE_TRAINING": "x"})
    assert raw.notes == ("$GPT_SIMPLE_MODEL_N_EMBD is not read; did you mean $GPT_SIMPLE__MODEL__N_EMBD?",)


def test_an_option_takes_a_list_of_tables_as_toml_and_as_json(bench):
    phases = [("data.curriculum", '[{"duration_tokens": 5, "mix": {"a": 1}}]')]
    as_toml = [("data.curriculum", "[{duration_tokens = 5, mix = {a = 1}}]")]
    assert bench.config(overrides=phases) == bench.config(overrides=as_toml)
    assert bench.config(overrides=phases).data.curriculum[0].mix == {"a": 1}
    assert bench.config(overrides=[("training.output_dir", "{run}")]).training.output_dir == "{run}"
