"""Combinations that cannot work are reported with the places of all fields involved."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model.n_embd = 100\nmodel.n_head = 3",
         "config.toml:1 (model.n_embd), config.toml:2 (model.n_head): n_embd 100 is not a multiple of n_head 3"),
        ("model.n_head = 12\nmodel.n_kv_head = 5",
         "config.toml:1 (model.n_head), config.toml:2 (model.n_kv_head): n_head 12 is not a multiple of n_kv_head 5"),
        ("training.shard_size = 8",
         "config.toml:1 (training.shard_size), training.parallel: shard_size 8 needs parallel \"fsdp\", not \"auto\""),
        ("model.n_embd = 36",
         "config.toml:1 (model.n_embd), model.n_head, model.position: the width of a head, n_embd / n_head = 3,"),
        ("model.rope_scaling_factor = 2",
         "model.rope_scaling_type, config.toml:1 (model.rope_scaling_factor): rope_scaling_factor 2 needs"),
        ("model.position = 'learned'\nmodel.rope_scaling_type = 'ntk'",
         "config.toml:2 (model.rope_scaling_type), config.toml:1 (model.position): rope_scaling_type"),
        ("model.n_positions = 1024",
         "config.toml:1 (model.n_positions), data.max_length: max_length 2048 is longer than"),
        ("data.packing = 'best_fit'\ndata.overlap_size = 2048",
         "config.toml:2 (data.overlap_size), data.max_length: overlap_size 2048 must be smaller than max_length 2048"),
        ("data.overlap_size = 8",
         "config.toml:1 (data.overlap_size), data.packing: overlap_size 8 needs packing"),
        ("training.max_runtime_seconds = 20",
         "config.toml:1 (training.max_runtime_seconds), training.walltime_reserve_seconds: "),
        ("[[data.curriculum]]\nduration_tokens = 1\nmix = {a = 1, b = -1}",
         "config.toml:3 (data.curriculum[0].mix): the weight of b is negative"),
        ("[[data.curriculum]]\nduration_tokens = 1\nmix = {a = 0}",
         "config.toml:3 (data.curriculum[0].mix): the mix needs at least one bucket with a positive weight"),
        ("data.curriculum = [{duration_tokens = 1024, mix = {a = 1}}, {duration_tokens = 1, mix = {a = 1}}]",
         "config.toml:1 (data.curriculum[0].duration_tokens), data.max_length: phase 1 lasts 1,024 tokens, half a row"),
        ("training.warmup_stages = [{steps = 1, length = 512}, {steps = 1, length = 3}]",
         "config.toml:1 (training.warmup_stages[1].length), data.max_length: length 3 of stage 2 does not divide "
         "max_length 2048; 2 does: a sample is cut into rows of equal length"),
        ("data.max_length = 7\ntraining.warmup_stages = [{steps = 1, length = 3}]",
         "config.toml:2 (training.warmup_stages[0].length), config.toml:1 (data.max_length): length 3 of stage 1 does "
         "not divide max_length 7; 7 does"),
        ("data.max_length = 100\ntraining.warmup_stages = [{steps = 1, length = 128}]",
         "config.toml:2 (training.warmup_stages[0].length), config.toml:1 (data.max_length): length 128 of stage 1"),
        ("training.activation_memory_budget = 0.5\ntraining.compile = false\ntraining.gradient_checkpointing = 'auto'",
         "config.toml:1 (training.activation_memory_budget), config.toml:2 (training.compile): "
         "activation_memory_budget 0.5 needs compile: only the compiler has one; set compile to true, or leave"),
        ("training.activation_memory_budget = 0\ntraining.compile_backend = 'eager'\n"
         "training.gradient_checkpointing = false",
         "config.toml:1 (training.activation_memory_budget), config.toml:2 (training.compile_backend): "
         'activation_memory_budget 0 does nothing with the backend "eager"; use "inductor"'),
        ("training.activation_memory_budget = 1",
         "config.toml:1 (training.activation_memory_budget), training.gradient_checkpointing: "
         'activation_memory_budget 1 says what is recomputed, and so does gradient_checkpointing; set '),
        ("plugins.require = ['a', 'b']\nplugins.disable = ['b']",
         'config.toml:1 (plugins.require), config.toml:2 (plugins.disable): plugin "b" is both required and disabled'),
    ],
)  # fmt: skip
def test_a_conflict_names_every_place(bench, text, line):
    (found,) = bench.mistakes(text)
    assert found.startswith(line)


def test_all_mistakes_of_a_plan_come_at_once(bench):
    found = bench.mistakes(
        "[[training.warmup_stages]]\nsteps = 0\n[[training.warmup_stages]]\nlength = 16\n"
        "[[training.warmup_stages]]\nsteps = 1\ngradient_accumulation_steps = 0\nlenght = 3"
    )
    keys = ["[0].steps", "[1].steps", "[2].gradient_accumulation_steps", "[2].lenght"]
    assert len(found) == len(keys)
    assert all(f"training.warmup_stages{key}" in line for key, line in zip(keys, found, strict=True)), found


def test_a_conflict_between_sources(bench):
    assert bench.mistakes("model.n_embd = 64\nmodel.n_head = 4", overrides=[("model.n_head", "5")]) == [
        "config.toml:1 (model.n_embd), --model.n_head: n_embd 64 is not a multiple of n_head 5"
    ]


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ({"overrides": [("model.rope_scaling_factor", "2")]}, "--model.rope_scaling_factor"),
        (
            {"environ": {"GPT_SIMPLE__MODEL__ROPE_SCALING_FACTOR": "2"}},
            "$GPT_SIMPLE__MODEL__ROPE_SCALING_FACTOR (model.rope_scaling_factor)",
        ),
        ({"sections": {"model": {"rope_scaling_factor": 2}}}, "train(...) (model.rope_scaling_factor)"),
    ],
)
def test_a_conflict_with_a_default_names_both_places(bench, source, place):
    (found,) = bench.mistakes(**source)
    assert found.startswith(f"model.rope_scaling_type, {place}: rope_scaling_factor 2 needs")


def test_a_conflict_in_a_list_from_the_command_line(bench):
    (found,) = bench.mistakes(overrides=[("data.curriculum", "[{duration_tokens = 1, mix = {a = 0}}]")])
    assert found.startswith("--data.curriculum (data.curriculum[0].mix): the mix needs at least one bucket")


def test_a_field_that_is_wrong_itself_is_not_blamed_twice(bench):
    assert bench.mistakes("model.n_embd = 64\nmodel.n_head = 0\n") == [
        "config.toml:2: model.n_head: expected an integer >= 1, got 0"
    ]


def test_odd_heads_are_fine_without_rotary_positions(bench):
    assert bench.config("[model]\nn_embd = 36\nposition = 'learned'").model.n_embd == 36
