"""Every mistake gets a line: its place, what was expected, what was probably meant."""

from __future__ import annotations

import pytest
from attrs import field, frozen, validators

from gpt_simple.config.load import read
from gpt_simple.config.structure import structure
from gpt_simple.errors import ConfigError, PluginError

SEVEN = """\
[training]
max_step = 100
seed = 5.7
compile = "false"
learning_rate = 1e-3

[model]
activation = "swishh"
n_head = 5
[trainig]
"""


def test_seven_mistakes_are_seven_lines(bench):
    assert bench.mistakes(SEVEN) == [
        "config.toml:2: training.max_step: unknown key; did you mean training.max_steps?",
        "config.toml:3: training.seed: expected an integer >= 0, got 5.7",
        'config.toml:4: training.compile: expected a boolean (true or false), got "false"; write false',
        "config.toml:5: training.learning_rate: unknown key; did you mean optimizer.learning_rate?",
        'config.toml:8: model.activation: expected one of "swish", "gelu", "relu", got "swishh"; did you mean "swish"?',
        "model.n_embd, config.toml:9 (model.n_head): n_embd 768 is not a multiple of n_head 5",
        "config.toml:10: trainig: unknown section; did you mean [training]?",
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.max_steps", "1000.7", "expected an integer >= 1, got 1000.7"),
        ("training.max_steps", "true", "expected an integer >= 1, got true"),
        ("training.max_steps", '"10"', 'expected an integer >= 1, got "10"; write 10'),
        ("training.max_steps", "[1, 2]", "expected an integer >= 1, got [1, 2]"),
        ("training.max_steps", "9223372036854775808", "expected an integer >= 1, got 9223372036854775808"),
        ("training.compile", "1", "expected a boolean (true or false), got 1"),
        ("training.output_dir", "5", 'expected text, got 5; write "5"'),
        ("training.output_dir", "2024-01-01", "expected text, got a date"),
        ("training.output_dir", '"a\\u0000b"', "expected text without null characters and half surrogates"),
        ("training.save_steps", '"nil"', 'expected an integer >= 0 or null, got "nil"; write null (in TOML "null"'),
        ("training.mixed_precision", '"none"', 'or null, got "none"; did you mean "no"?'),
        ("training.mixed_precision", '"fp8"', 'expected one of "auto", "bf16", "fp16", "no" or null, got "fp8"'),
        (
            "training.gradient_checkpointing",
            "-1",
            'expected a boolean (true or false), an integer >= 0 or "auto", got -1',
        ),
        (
            "training.gradient_checkpointing",
            "1.5",
            'expected a boolean (true or false), an integer >= 0 or "auto", got 1.5',
        ),
        ("optimizer.learning_rate", "nan", "expected a number > 0, got NaN"),
        ("optimizer.learning_rate", "inf", "expected a number > 0, got Infinity"),
        ("optimizer.learning_rate", '".5"', 'expected a number > 0, got ".5"; write 0.5'),
        ("optimizer.beta1", "1", "expected a number >= 0 and < 1, got 1"),
        ("data.path", "3", 'expected text, a list of text or null, got 3; write "3"'),
        ("data.curriculum", "3", "expected a list of tables, got 3"),
        ("plugins.disable", '"console"', 'expected a list of text, got "console"; write ["console"]'),
        ("plugins.console", "true", "expected a table [plugins.console] or one of disable, require, strict"),
        ("model", "3", "expected a table, got 3"),
    ],
)
def test_one_wrong_value(bench, key, value, message):
    (line,) = bench.mistakes(f"{key} = {value}")
    assert line.startswith(f"config.toml:1: {key}: ")
    assert message in line


@pytest.mark.parametrize(
    ("suffix", "text", "word"),
    [
        (".yaml", "training: {output_dir: 010}", '"010"'),
        (".yaml", "training: {output_dir: True}", '"True"'),
        (".yaml", "training:\n  output_dir: 0x1F  # hex", '"0x1F"'),
        (".yaml", "data: {path: [1_0]}", '"1_0"'),
        (".yaml", "plugins: {disable: 1e3}", '["1e3"]'),
        (".json", '{"training": {"output_dir": 1.50}}', '"1.50"'),
        (".toml", "training.output_dir = 1_000  # text", '"1_000"'),
        (".toml", "training = {output_dir = 2024-01-01}", '"2024-01-01"'),
        (".toml", "[data]\npath = [\n  'a', +1,\n]", '"+1"'),
    ],
)
def test_a_hint_quotes_the_value_as_it_was_typed(bench, suffix, text, word):
    (line,) = bench.mistakes(text, suffix)
    assert line.endswith(f"; write {word}")


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("model.n_embd = 66\nmodel.n_heads = 6", "model.n_heads"),
        ("model.n_embd = 66\n[data]\nn_head = 6", "data.n_head"),
        ("n_head = 6\n[model]\nn_embd = 66", "n_head"),
        ("[modle]\nn_head = 6\nn_embd = 66\n[model]\nn_kv_head = 5", "modle"),
        ("data.overlap_size = 8\ndata.pakcing = 'best_fit'", "data.pakcing"),
        ("training.max_runtime_seconds = 60\ntraining.reserve_seconds = 5", "training.reserve_seconds"),
    ],
)
def test_a_misspelt_key_is_no_conflict_with_its_default(bench, text, near):
    (line,) = bench.mistakes(text)
    assert f" {near}: unknown " in line
    assert "did you mean" in line


def test_a_misspelt_key_hides_no_conflict_with_a_value(bench):
    assert len(bench.mistakes("[model]\nn_embd = 66\nn_head = 12\nn_heads = 6")) == 2


def test_integral_floats_are_integers_and_integers_are_numbers(bench):
    config = bench.config("training.max_steps = 1e3\noptimizer.weight_decay = 0\n")
    assert (config.training.max_steps, type(config.training.max_steps)) == (1000, int)
    assert (config.optimizer.weight_decay, type(config.optimizer.weight_decay)) == (0.0, float)


def test_null_is_text_in_toml_and_null_in_yaml(bench):
    for config in (
        bench.config('[training]\nkeep_last_k = "null"\nmixed_precision = "null"\n'),
        bench.config("training: {keep_last_k: null, mixed_precision: ~}\nmodel:\n", ".yaml"),
    ):
        assert config.training.keep_last_k is None
        assert config.training.mixed_precision is None
    assert bench.mistakes("training: {max_steps: null}", ".yaml") == [
        "config.yaml:1: training.max_steps: expected an integer >= 1, got null"
    ]


def test_mistakes_inside_a_list_name_the_item(bench):
    assert bench.mistakes("data.path = ['a', 3]") == ['config.toml:1: data.path[1]: expected text, got 3; write "3"']


def test_mistakes_inside_a_curriculum_have_their_own_lines(bench):
    text = "[[data.curriculum]]\nmix = {a = 1}\n\n"
    text += "[[data.curriculum]]\nduration_tokens = 5\n[data.curriculum.mix]\nb = 'x'\n"
    assert bench.mistakes(text) == [
        "config.toml:1: data.curriculum[0].duration_tokens: this key must be given; expected an integer >= 1",
        'config.toml:7: data.curriculum[1].mix.b: expected a number, got "x"',
    ]


def test_a_misspelt_key_inside_a_list_is_recognised(bench):
    assert bench.mistakes("data.curriculum = [{duration_tokens = 1, mix = {a = 1}, durations_tokens = 2}]") == [
        "config.toml:1: data.curriculum[0].durations_tokens: unknown key; "
        "did you mean data.curriculum[0].duration_tokens?"
    ]


def test_a_key_outside_any_section_gets_a_suggestion(bench):
    assert bench.mistakes("max_steps = 5\n") == [
        "config.toml:1: max_steps: unknown key; did you mean training.max_steps?"
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.epochs", "unknown key; a run is as long as training.max_steps says"),
        ("training.num_train_epochs", "unknown key; a run is as long as training.max_steps says"),
        ("training.lr", "unknown key; did you mean optimizer.learning_rate?"),
        ("training.max_lenght", "unknown key; did you mean data.max_length?"),
        ("seed", "unknown key; did you mean data.seed or training.seed?"),
        ("model.seed", "unknown key; did you mean data.seed or training.seed?"),
        ("training.momentum", "unknown key; all keys are in `gpt-simple run --help`"),
    ],
)
def test_a_suggestion_in_other_sections_names_all_of_them(bench, key, message):
    assert bench.mistakes(f"{key} = 1") == [f"config.toml:1: {key}: {message}"]


def test_messages_are_printable_and_short(bench):
    for text in ("seed = \x1b[31m\n", "seed: \x1b]0;title\x07\n", "seed = 1 \x9b\n", f"seed = {'9a' * 5000}\n"):
        for line in bench.mistakes(f"[training]\n{text}"):
            assert line.isprintable(), line
            assert len(line) < 200, line
    (line,) = bench.mistakes(overrides=[("training.seed", "\x1b[31m\u202e")])
    assert line == '--training.seed: expected an integer >= 0, got "\\u001b[31m\\u202e"'


def test_mistakes_of_variables_and_options_name_their_place(bench):
    assert bench.mistakes(
        environ={"GPT_SIMPLE__TRAINING__SEDE": "1", "GPT_SIMPLE__TRAINING": "1"},
        overrides=[("training.max_steps", "many"), ("optimizer.betta1", "0.9"), ("nowhere.at", "1")],
    ) == [
        "$GPT_SIMPLE__TRAINING__SEDE: training.sede: unknown key; did you mean training.seed?",
        "--nowhere.at: nowhere: unknown section; expected one of model, data, optimizer, training, plugins",
        "--optimizer.betta1: unknown key; did you mean optimizer.beta1?",
        '--training.max_steps: expected an integer >= 1, got "many"',
    ]


@frozen
class CsvConfig:
    path: str = "loss.csv"
    every: int = field(default=1, validator=validators.ge(1))


def test_a_plugins_table_is_checked_by_its_own_class(bench):
    text = "[plugins.csv]\npth = 'x'\n[plugins.other]\nanything = 1\n"
    assert bench.mistakes(text, plugins={"csv": CsvConfig}) == [
        "config.toml:2: plugins.csv.pth: unknown key; did you mean plugins.csv.path?"
    ]
    (line,) = bench.mistakes("[plugins.csv]\nevery = 0\n", plugins={"csv": CsvConfig})
    assert line.startswith("config.toml:1: plugins.csv: ")
    assert "every" in line
    config = structure(bench.raw("[plugins.other]\na = 1\n"), plugin_configs={"csv": CsvConfig})
    assert config.plugins.tables == {"csv": CsvConfig(), "other": {"a": 1}}


@frozen
class TinyModel:
    name: str = "tiny"
    width: int = 8


def test_a_component_brings_the_class_of_its_section(bench):
    raw = bench.raw("[model]\nname = 'tiny'\nwidth = 16\n")
    assert structure(raw, sections={"model": TinyModel}).model == TinyModel(width=16)
    with pytest.raises(ConfigError, match=r"^config\.toml:2: model\.n_embd: unknown key"):
        structure(bench.raw("[model]\nn_embd = 16\n"), sections={"model": TinyModel})
    made = read(None, environ={}, sections={"model": TinyModel()})
    assert made.get("model.name") == "tiny", "the name decides which class is used"


def test_an_unsupported_field_type_is_a_plugin_error():
    @frozen
    class Unsupported:
        where: complex = 0j

    with pytest.raises(PluginError, match=r"Unsupported\.where: a configuration cannot hold"):
        structure(read(None, environ={}), plugin_configs={"bad": Unsupported})
