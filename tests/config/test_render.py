"""What is written reads back to the same configuration, in every format; the schema and the page follow the code."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
import tomli
import yaml
from attrs import evolve, frozen

from gpt_simple import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from gpt_simple.config.json_schema import json_schema
from gpt_simple.config.load import read
from gpt_simple.config.origin import Origins
from gpt_simple.config.render import to_json, to_toml, to_yaml
from gpt_simple.config.schema import Config, Phase, PluginsConfig
from gpt_simple.config.structure import SECTIONS, structure
from gpt_simple.config.types import fields_of

ROOT = Path(__file__).parents[2]

ODD = Config(
    model=ModelConfig(n_kv_head=3, norm_eps=1e-12, rope_base=1e16),
    data=DataConfig(
        path=("a b", 'quo"te', "new\nline", "\u2028\x7f\ufeff😀", "C:\\x"),
        curriculum=(Phase(9_999, {"web": 0.1, "a.b": 1 / 3, "null": 1, "": 2}), Phase(20, {"x": 1e-7})),
    ),
    optimizer=OptimizerConfig(max_grad_norm=None, learning_rate=1e-5),
    training=TrainingConfig(keep_last_k=None, save_steps=None, gradient_checkpointing=3, output_dir="no"),
    plugins=PluginsConfig(("a",), (), True, {"raw": {"key": [1, {"inner": "x"}], "no": False}, "empty": {}}),
)
WRITERS = {".toml": to_toml, ".yaml": to_yaml, ".json": to_json}


@pytest.mark.parametrize("config", [Config(), ODD], ids=["default", "odd"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_written_text_reads_back_to_the_same_configuration(bench, suffix, config):
    assert bench.config(WRITERS[suffix](config), suffix) == config


def test_written_text_is_yaml_1_1_and_toml_1_0():
    old_reader = yaml.safe_load(to_yaml(ODD))
    assert old_reader["optimizer"]["learning_rate"] == 1e-5
    assert old_reader["training"]["output_dir"] == "no"
    assert json.loads(to_json(ODD))["model"]["rope_base"] == 1e16
    assert tomllib.loads(to_toml(ODD))["data"]["path"] == list(ODD.data.path)


def test_defaults_are_written_as_comments_and_stay_defaults(bench):
    raw = bench.raw("[training]\nseed = 7\nmax_steps = 1000\n[plugins.x]\na = 1\n")
    config = structure(raw)
    for suffix, writer in ((".toml", to_toml), (".yaml", to_yaml)):
        text = writer(config, chosen=raw.origins)
        again = bench.raw(text, suffix)
        assert structure(again) == config
        assert not again.origins.is_default("training.max_steps")
        assert again.origins.is_default("training.compile")


def test_every_comment_of_a_written_file_comes_from_the_schema():
    text = to_toml(Config())
    for cls in SECTIONS.values():
        for spec in fields_of(cls):
            assert spec.doc, f"{cls.__name__}.{spec.name} has no help"
            assert f"# {spec.doc} [" in text


@frozen
class SinkConfig:
    """Where lines go."""

    path: str = "x"
    every: int | None = None


def test_the_schema_has_every_field_with_bounds_default_and_help():
    schema = json_schema({"sink": SinkConfig})
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    for name, cls in SECTIONS.items():
        properties = schema["properties"][name]["properties"]
        assert list(properties) == [spec.name for spec in fields_of(cls)]
        assert all("description" in one and "default" in one for one in properties.values())
    assert schema["properties"]["optimizer"]["properties"]["beta1"] == {
        "type": "number", "minimum": 0, "exclusiveMaximum": 1,
        "description": "decay of the first moment", "default": 0.9,
    }  # fmt: skip
    assert schema["properties"]["plugins"]["properties"]["sink"]["properties"]["every"] == {
        "anyOf": [{"type": "integer"}, {"enum": [None, "null", "none"]}], "default": None,
    }  # fmt: skip
    phase = schema["properties"]["data"]["properties"]["curriculum"]["items"]
    assert phase["required"] == ["duration_tokens", "mix"]


def accepts(schema: Mapping[str, object], value: object) -> bool:
    """As much of draft-07 as the schema uses."""
    known = {"$schema", "title", "description", "default", "type", "properties", "additionalProperties", "required",
             "anyOf", "enum", "items", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}  # fmt: skip
    assert set(schema) <= known
    match schema:
        case {"anyOf": [*choices]}:
            return any(accepts(choice, value) for choice in choices)
        case {"enum": [*choices]}:
            return any(value == choice and type(value) is type(choice) for choice in choices)
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if "integer" in kinds or "number" in kinds:
        return (
            number
            and ("number" in kinds or value == int(value))
            and value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
    if not any(isinstance(value, types[kind]) for kind in kinds):
        return False
    if isinstance(value, list):
        return all(accepts(schema["items"], item) for item in value)
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(name in value for name in schema.get("required", ())) and all(
            accepts(properties[key], item) if key in properties else rest is True or (rest and accepts(rest, item))
            for key, item in value.items()
        )
    return True


@pytest.mark.parametrize("config", [Config(), ODD], ids=["default", "odd"])
def test_the_schema_accepts_what_is_written(config):
    for document in (tomli.loads(to_toml(config)), json.loads(to_json(config))):
        assert accepts(json_schema(), document)


def test_the_schema_accepts_a_section_of_comments_only(bench):
    text = to_yaml(structure(bench.raw(), plugin_configs={"sink": SinkConfig}), chosen=Origins())
    document = yaml.safe_load(text)
    assert document["training"] is document["plugins"]["sink"] is None
    assert accepts(json_schema({"sink": SinkConfig}), document)
    assert bench.config(text, ".yaml").training == Config().training


@pytest.mark.parametrize(
    "document",
    [
        {"trainig": {}},
        {"training": {"max_step": 1}},
        {"training": {"max_steps": 0}},
        {"training": {"compile": "false"}},
        {"optimizer": {"beta1": 1}},
        {"data": {"curriculum": [{"mix": {"a": 1}}]}},
        {"plugins": {"console": 1}},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(bench, document):
    assert not accepts(json_schema(), document)
    assert bench.mistakes(json.dumps(document), ".json")


def test_every_field_of_every_section_survives_a_change(bench):
    """Each field by itself, so that none is forgotten in writing or reading."""
    for name, cls in SECTIONS.items():
        for spec in fields_of(cls):
            if spec.type.accepts(type(None)) and spec.default is not None:
                config = evolve(Config(), **{name: evolve(cls(), **{spec.name: None})})
                for suffix, writer in WRITERS.items():
                    assert bench.config(writer(config), suffix) == config, f"{name}.{spec.name} in {suffix}"


def test_the_page_is_in_step_with_the_schema():
    build = runpy.run_path(str(ROOT / "docs/build_reference.py"))
    assert build["PAGE"].read_text(encoding="utf-8") == build["page"](), "run: python docs/build_reference.py"


def test_the_examples_of_the_page_and_the_repository_are_valid(bench):
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(toml|yaml)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    for suffix, text in blocks:
        bench.config(text, f".{suffix}")
    for path in (ROOT / "examples").glob("*.toml"):
        structure(read(path, environ={}))
