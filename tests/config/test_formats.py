"""The text itself: syntax errors and hints, and the line of every key."""

from __future__ import annotations

import pytest

from gpt_simple.config.parse_toml import parse_toml
from gpt_simple.config.parse_yaml import parse_json, parse_yaml
from gpt_simple.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed = True", "config.toml:2:8: write true, not True"),
        ("compile = no", "config.toml:2:11: write false, not no"),
        ("seed = None", 'config.toml:2:8: TOML has no None: leave the key out or write "null"'),
        ("seed = null # x", 'config.toml:2:8: TOML has no null: leave the key out or write "null"'),
        ("seed = .5", "config.toml:2:8: write 0.5, not .5"),
        ("seed = 5.", "config.toml:2:9: write 5.0, not 5."),
        ("seed = 007", "config.toml:2:9: write 7, not 007"),
        ("output_dir = 010", 'config.toml:2:15: write 10, not 010, or "010" for text'),
        ("seed = -.5e-3", "write -0.5e-3, not -.5e-3"),
        ("output_dir = my runs", 'config.toml:2:14: text needs quotes: "my runs"'),
        ("seed =", "config.toml:2:7: a value is missing after the ="),
        ("seed: 5", "config.toml:2:5: write seed = 5"),
        ("seed = 1\nseed = 2", "config.toml:3:"),
        ("seed = 1,", "config.toml:2:9: expected one value, got 1,; text needs quotes, a list needs brackets"),
        ("seed = 5 000 # x", "config.toml:2:10: expected one value, got 5 000;"),
        ("compile = TRUE\r", "config.toml:2:11: write true, not TRUE"),
    ],
)
def test_habits_from_other_formats_get_a_hint(bench, text, line):
    (found,) = bench.mistakes(f"[training]\n{text}\n")
    assert line in found


def test_yaml_in_a_toml_file_is_reported_at_its_first_line(bench):
    assert bench.mistakes("training:\n  max_step: 5\n") == ["config.toml:1:9: write [training]"]


def test_toml_in_a_yaml_file_is_recognised(bench):
    (found,) = bench.mistakes("[training]\nmax_steps = 5\n", ".yaml")
    assert found.endswith("; this looks like TOML, whose files end in .toml")


def test_a_duplicate_key_in_toml_is_named(bench):
    (found,) = bench.mistakes("[training]\nseed = 1\nmax_steps = 2\nseed = 3\n[model]\n")
    assert found == "config.toml:4:9: training.seed: given twice, first on line 2; keep one of the two"
    (found,) = bench.mistakes("[training]\nseed = 1\nseed.x = 2\n")
    assert found.endswith("this key is given twice; keep one of the two")
    (found,) = bench.mistakes("[plugins.x]\napi_key = 'a'\napi_key = 'b'\n")
    assert found == "config.toml:3:14: plugins.x.api_key: given twice, first on line 2; keep one of the two"


def test_a_table_that_is_opened_twice_in_toml_is_named(bench):
    for begin in ("[training]\nseed = 1", "training.seed = 1\n"):
        (found,) = bench.mistakes(f"{begin}\n[training]\nmax_steps = 2\n")
        assert found == "config.toml:3:10: [training] is there already on line 1; put its keys together"


def test_the_first_error_in_the_text_of_toml_ends_reading(bench):
    for rest in ("max_steps = none\n", "max_step = 5\n", "output_dir = 'open\n"):
        assert bench.mistakes(f"[training]\ncompile = True\n{rest}") == ["config.toml:2:11: write true, not True"]


def test_an_unreadable_yaml_value_hides_no_mistake_of_its_line(bench):
    text = "training:\n  learning_rate: !x 5\n  seed: !x 1\nmodle:\n  n_embd: 0\ndata: {path: [!x a], max_length: 0}\n"
    assert bench.mistakes(text, ".yaml") == [
        "config.yaml:2: training.learning_rate: unknown key; did you mean optimizer.learning_rate?",
        "config.yaml:2:18: the tag !x is not supported; write a plain value",
        "config.yaml:3:9: the tag !x is not supported; write a plain value",
        "config.yaml:4: modle: unknown section; did you mean [model]?",
        "config.yaml:6: data.max_length: expected an integer >= 2, got 0",
        "config.yaml:6:15: the tag !x is not supported; write a plain value",
    ]


def test_lines_of_toml_keys():
    text = """\
a.b = 1
"c d" . 'e.f' = [ # comment ] {
  1, "]", # "
  { x = '''
y = 1''', z = 2 },
]
[t]
s = \"\"\"
[not.a.table]
k = 1 \\\"\"\"\"\"
k = 2026-01-01 10:00:00
"\\u0041" = { p = { q = 1 } }
[[t.array]]
v = 1
[t.array.inner]
w = 2
[[t.array]]
v = 3
"""
    parsed = parse_toml(text, "c.toml")
    assert parsed.values is not None
    assert parsed.lines == {
        "a": 1, "a.b": 1, "c d": 2, "c d.e.f": 2, "c d.e.f[0]": 3, "c d.e.f[1]": 3, "c d.e.f[2]": 4,
        "c d.e.f[2].x": 4, "c d.e.f[2].z": 5, "t": 7, "t.s": 8, "t.k": 11, "t.A": 12, "t.A.p": 12, "t.A.p.q": 12,
        "t.array": 13, "t.array[0]": 13, "t.array[0].v": 14, "t.array[0].inner": 15, "t.array[0].inner.w": 16,
        "t.array[1]": 17, "t.array[1].v": 18,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-.inf", float("-inf")), ("1_000_000", 1_000_000),
        ("0x10", 16), ("0o17", 15), ("017", 17), ("+3", 3), ("no", "no"), ("on", "on"), ("True", True),
        ("FALSE", False), ("tRue", "tRue"), ("~", None), ("", None), ("Null", None), ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"), ("1e", "1e"), ("_1", "_1"), ("<<", "<<"), ('"1"', "1"), ("nan", "nan"), ("0b1", "0b1"),
    ],
)  # fmt: skip
def test_yaml_scalars_follow_the_core_schema(text, value):
    found = parse_yaml(f"a:\n  b: {text}\n", "c.yaml").values
    assert found == {"a": {"b": value}}
    assert type(found["a"]["b"]) is type(value)


def test_yaml_keys_are_text_as_written():
    assert parse_yaml("mix: {2024: 1, no: 2, 1e3: 3}", "c.yaml").values == {"mix": {"2024": 1, "no": 2, "1e3": 3}}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training:\n  seed: 1\n  max_steps: 2\n  seed: 3\n",
         "config.yaml:4:3: training.seed: given twice, first on line 2"),
        ("training:\n\tseed: 1\n", "config.yaml:2:1: "),
        ("training: [1\n", "config.yaml:2:1: "),
        ("training: {seed: !!python/object:os.system 1}\n", "config.yaml:1:18: the tag "),
        ("training: &a {seed: *a}\n", "config.yaml:1:11: training.seed contains itself"),
        ("training: \x01\n", "config.yaml:1: the character U+0001 is not allowed"),
        ("- a\n- b\n", "config.yaml:1:1: expected sections such as `training:`"),
        ('output: "\\UFFFFFFFF"\n', "config.yaml: "),
        ("training: &a {seed: 1}\nmodel:\n  <<: *a\n", "config.yaml:3:3: merging with << is no part of YAML 1.2"),
        ("{model: , [a]: 3}", "config.yaml:1:11: a key must be plain text"),
        ("a: 1\n---\nb: 2\n", "config.yaml:2:1: "),
    ],
)  # fmt: skip
def test_mistakes_in_yaml_text(bench, text, line):
    assert bench.mistakes(text, ".yaml")[0].startswith(line)


def test_aliases_of_yaml_are_values():
    parsed = parse_yaml("a: &x {p: 1}\nb: *x\n", "c.yaml")
    assert parsed.values == {"a": {"p": 1}, "b": {"p": 1}}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"training": {"seed": 1,}}', "config.json:1:"),
        ('{\n"training": {\n"seed": 1, "seed": 2}}', "config.json:3:12: training.seed: given twice, first on line 3"),
        ("[]", "config.json:1:1: expected an object of sections"),
        ('{"training": {\n\t"seed": "1"}}', 'config.json:2: training.seed: expected an integer >= 0, got "1"; write 1'),
    ],
)  # fmt: skip
def test_mistakes_in_json(bench, text, line):
    assert bench.mistakes(text, ".json")[0].startswith(line)


def test_json_text_is_read_as_json_reads_it():
    parsed = parse_json('{"a": "\\ud83d\\ude00", "b": "no", "<<": 1}', "c.json")
    assert (parsed.values, parsed.mistakes) == ({"a": "😀", "b": "no", "<<": 1}, [])


OLD = """\
model:
  attention_mode: flex
data:
  path: corpus
  packing: true
  curriculum: null
  allow_bucket_exhaustion: true
  allow_budget_mismatch: true
  overlap_size: 256
training:
  mixed_precision: null
"""


def test_files_of_the_earlier_yaml_tool_load_with_one_note_a_key(bench):
    raw = bench.raw(OLD, ".yaml")
    data = bench.config(OLD, ".yaml").data
    assert (data.document_mask, data.packing, data.on_exhaustion, data.curriculum, data.overlap_size) == (
        True, "best_fit", "renormalise", (), 256,
    )  # fmt: skip
    assert [note.partition(" ")[::2] for note in raw.notes] == [
        ("config.yaml:2:", "model.attention_mode flex is read as data.document_mask true; "
         "the attention kernel is chosen by device"),
        ("config.yaml:7:", "data.allow_bucket_exhaustion true is read as data.on_exhaustion renormalise"),
        ("config.yaml:8:", "data.allow_budget_mismatch is ignored: a curriculum may be shorter or longer than the run"),
        ("config.yaml:5:", "data.packing true is read as data.packing best_fit"),
    ]  # fmt: skip
    assert raw.origins.of("data.on_exhaustion").where == "config.yaml:7"


def test_old_and_new_spelling_override_each_other(bench):
    old = bench.config(OLD, ".yaml", overrides=[("data.allow_bucket_exhaustion", "false")])
    assert old.data.on_exhaustion == "halt"
    new = bench.config(OLD, ".yaml", overrides=[("data.document_mask", "false"), ("data.on_exhaustion", "repeat")])
    assert (new.data.document_mask, new.data.on_exhaustion) == (False, "repeat")
    unpacked = bench.config("data: {packing: false}", ".yaml").data
    assert (unpacked.packing, unpacked.document_mask) == ("best_fit", True)


def test_an_old_key_beside_the_new_one_gives_way_and_says_so(bench):
    raw = bench.raw("model: {attention_mode: causal}\ndata: {document_mask: true}", ".yaml")
    assert raw.notes[0].startswith("config.yaml:1: model.attention_mode causal is ignored: data.document_mask is given")
    assert raw.get("data.document_mask") is True
    raw = bench.raw("data:\n  on_exhaustion: halt\n  allow_bucket_exhaustion: true", ".yaml")
    assert raw.notes == ("config.yaml:3: data.allow_bucket_exhaustion true is ignored: data.on_exhaustion is given",)
    assert (raw.get("data.on_exhaustion"), raw.origins.of("data.on_exhaustion").line) == ("halt", 2)


def test_an_old_key_with_an_unknown_value_is_a_mistake(bench):
    text = "model: {attention_mode: flash}\ndata: {allow_bucket_exhaustion: 1}"
    assert bench.mistakes(text, ".yaml") == [
        "config.yaml:1: model.attention_mode: expected causal, sdpa_mask or flex (of the earlier YAML tool), "
        "or data.document_mask",
        "config.yaml:2: data.allow_bucket_exhaustion: expected true or false (of the earlier YAML tool), "
        "or data.on_exhaustion",
    ]


@pytest.mark.parametrize("part", ["[*{0},*{0},*{0},*{0},*{0},*{0}]", "{{k: *{0}, l: *{0}, m: *{0}, n: *{0}}}"])
def test_aliases_of_aliases_are_refused(part: str) -> None:
    lines = ["a0: &a0 x", *(f"a{n}: &a{n} {part.format(f'a{n - 1}')}" for n in range(1, 20))]
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        parse_yaml("\n".join(lines), "c.yaml")


@pytest.mark.parametrize("text", ["a: " + "[" * 5000, "a: " + "{a: " * 2000 + "}" * 2000])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_yaml(text, "c.yaml")
