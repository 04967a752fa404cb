"""Every field of ``adapter_config.json`` is read, without effect, or refused with a sentence that says what to do."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import peft
import pytest

from server.adapters.content.config_fields import FIELDS, NO_EFFECT, OTHER_TOOLS, READ
from server.adapters.content.peft_config import MAX_KEY_CHARS, MAX_KEYS, LoRAConfig, Pattern, parse_peft_config

CONFIG: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}


def parse(**fields: Any) -> LoRAConfig:
    return parse_peft_config(CONFIG | fields)


def refusal(**fields: Any) -> str:
    with pytest.raises(ValueError, match=r"adapter_config\.json: ") as caught:
        parse(**fields)
    return str(caught.value)


def test_the_table_has_pefts_fields_and_no_others() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_what_peft_writes_by_default_is_served() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    written = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    assert parse_peft_config({**written, "peft_type": "LORA"}) == LoRAConfig(8, 8, target_modules=("q_proj",))


@pytest.mark.parametrize("name", [name for name, said in FIELDS.items() if said not in (READ, NO_EFFECT)])
def test_a_field_that_is_not_served_is_refused_only_when_active(name: str) -> None:
    idle: list[Any] = [None, False, [], {}]
    for value in idle:
        parse(**{name: value})
    assert refusal(**{name: [[0, 1]]}) == (f"adapter_config.json: {name} = [[0, 1]] is not supported: {FIELDS[name]}")


@pytest.mark.parametrize("name", [name for name, said in FIELDS.items() if said == NO_EFFECT])
def test_a_field_without_effect_may_say_anything(name: str) -> None:
    assert parse(**{name: {"a": 1}}) == parse()


def test_a_field_that_nobody_knows_is_refused_only_when_active() -> None:
    parse(new_field=False, enable_lora=[True])
    assert "new_field = 7 is not supported: its meaning is unknown" in refusal(new_field=7)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"peft_type": "LOHA"},
            "peft_type is 'LOHA': only LORA is served; convert it to plain LoRA: quickchange adapt",
        ),
        ({"peft_type": None}, 'peft_type is None: if the adapter is a LoRA, add "peft_type": "LORA"'),
        ({"task_type": "SEQ_CLS"}, "only CAUSAL_LM adapters are served"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights; save the adapter with path_initial_model"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "train it again with another init_lora_weights"),
        ({"init_lora_weights": "flux"}, "is 'flux', which is unknown and may change the base's"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights is {'a': 1}"),
        ({"use_dora": True, "lora_bias": True}, "exclude each other"),
        ({"use_dora": "yes"}, "use_dora is 'yes': it must be true or false"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 0}, "r is 0: it must be a positive integer"),
        ({"r": True}, "r is True"),
        ({"r": 1.5}, "r is 1.5"),
        ({"r": 10**12}, "r is 1000000000000"),
        ({"lora_alpha": "high"}, "lora_alpha is 'high': it must be a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern['q_proj'] is -1: it must be a positive integer"),
        ({"rank_pattern": {"q_proj": 2.5}}, "must be a positive integer"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern['q_proj'] is nan"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]: it must be an object"),
        ({"alpha_pattern": {"(?=q)": 1}}, "alpha_pattern: the key '(?=q)' cannot be matched"),
        ({"rank_pattern": {"(a)\\1": 1}}, "without lookarounds and backreferences"),
        ({"rank_pattern": {"(": 1}}, "the key '(' cannot be matched"),
        ({"rank_pattern": {"a" * 600: 1}}, f"has 600 characters; the limit is {MAX_KEY_CHARS}"),
        ({"rank_pattern": {str(n): 1 for n in range(3000)}}, f"it has 3000 keys; the limit is {MAX_KEYS}"),
        ({"target_modules": [3]}, "target_modules is [3]: it must be a list of names"),
        ({"target_modules": ["q_proj"] * 20_001}, "target_modules has 20001 names; the limit is 20000"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"target_parameters": {}}, "target_parameters is {}"),
        ({"trainable_token_indices": [1, 1]}, "it must be a list of different token ids"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices has [-1]"),
        ({"trainable_token_indices": []}, "trainable_token_indices has []"),
    ],
)
def test_a_value_that_cannot_be_served_is_refused(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_as_it_is_is_served(init: object) -> None:
    parse(init_lora_weights=init)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2.0},
        {"lora_alpha": 4.0},
        {"bias": None},
        {"task_type": None},
        {"task_type": ""},
        {"task_type": "SEQ_2_SEQ_LM"},
        {"task_type": "TaskType.CAUSAL_LM"},
        {"peft_type": "PeftType.LORA"},
        {"peft_type": "lora"},
        {"init_lora_weights": "true"},
        {"use_rslora": None},
        {"modules_to_save": None},
        {"rank_pattern": None, "alpha_pattern": None, "exclude_modules": None, "layers_to_transform": None},
    ],
)
def test_another_way_to_say_the_same_is_served(fields: dict[str, Any]) -> None:
    """``r: 8.0``, ``bias: null`` and a task_type of an encoder-decoder were refused, and change no delta."""
    assert parse(**fields) == parse()


def test_whole_numbers_of_a_pattern_may_be_floats() -> None:
    config = parse(rank_pattern={"q_proj": 8.0})
    assert config.rank("q_proj") == 8
    assert type(config.rank("q_proj")) is int


@pytest.mark.parametrize("name", [name for name, said in OTHER_TOOLS.items() if said == NO_EFFECT])
def test_a_field_of_another_tool_without_effect_may_say_anything(name: str) -> None:
    assert parse(**{name: [7]}) == parse()


@pytest.mark.parametrize("name", [name for name, said in OTHER_TOOLS.items() if said != NO_EFFECT])
def test_a_field_of_another_tool_that_changes_the_delta_is_refused(name: str) -> None:
    parse(**{name: False})
    assert f"{name} = 'yes' is not supported: {OTHER_TOOLS[name]}" in refusal(**{name: "yes"})


@pytest.mark.parametrize(
    "fields",
    [
        {"trl_version": "0.30.1"},
        {"tokenizer_name_or_path": "someone/model"},
        {"git_commit": "abc123"},
        {"created_at": "2026-11-27"},
        {"training_seed": 42},
        {"loraplus_lr_ratio": 16},
        {"head_dropout": 0.1},
        {"_comment": "the third run"},
        {"//": "made by hand"},
        {"new_config": {"enabled": False, "modules": [], "inner": {"path": None, "kind": ""}}},
        {"new_method": "none"},
        {"new_list": [None, False]},
    ],
)
def test_an_unknown_field_that_asks_for_nothing_or_records_how_it_was_made_is_served(fields: dict[str, Any]) -> None:
    assert parse(**fields) == parse()


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_version": 2},
        {"dora_version": 2},
        {"delta_scale": 0.5},
        {"scaling_version": "b"},
        {"new_method": "square"},
        {"new_flag": True},
        {"new_config": {"enabled": False, "first_layer": 0}},
        {"new_list": [0]},
        {"at_inference_time": "half"},
        {"lora_nums": 4},
    ],
)
def test_an_unknown_field_that_may_change_the_delta_is_refused_with_a_way_out(fields: dict[str, Any]) -> None:
    [(name, value)] = fields.items()
    assert f"{name} = {value!r} is not supported: its meaning is unknown" in refusal(**fields)
    assert "remove it from adapter_config.json if it changes no weight" in refusal(**fields)


def test_a_config_without_a_kind_is_told_which_to_add_and_not_to_convert() -> None:
    """It was told to convert what is plain LoRA already."""
    with pytest.raises(ValueError, match=r'peft_type is missing: if the adapter is a LoRA, add "peft_type": "LORA"$'):
        parse_peft_config({name: value for name, value in CONFIG.items() if name != "peft_type"})


def test_a_start_that_changed_the_base_can_be_converted() -> None:
    assert "or convert it to plain LoRA: quickchange adapters convert FOLDER" in refusal(init_lora_weights="pissa")


def test_scaling_is_alpha_by_rank_or_by_its_root() -> None:
    assert parse().scaling("q_proj") == 2
    assert parse(use_rslora=True, r=4, lora_alpha=3).scaling("q_proj") == 1.5
    config = parse(rank_pattern={"q_proj": 8}, alpha_pattern={r"layers\.1\..*": 6})
    assert config.scaling("model.layers.1.q_proj") == 6 / 8
    assert config.scaling("model.layers.2.v_proj") == 2


@pytest.mark.parametrize(
    "key",
    [
        "q_proj", "self_attn.q_proj", r"model\.layers\.1\.self_attn\.q_proj", ".*q_proj",
        "^model.layers.1.self_attn.q_proj",
        "layers.1.self_attn.(q|k)_proj", "proj", "1.*", r".*\.\d+\..*", "q_proj|v_proj", "model", "[qv]_proj$",
    ],
)  # fmt: skip
def test_keys_match_as_pefts_expressions_do(key: str) -> None:
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.10.self_attn.v_proj", "lm_head", "model.q_proj"):
        try:
            expected = re.match(rf"(.*\.)?({key})$", module) is not None  # peft.utils.other.get_pattern_key
        except re.error:
            continue
        assert (Pattern.of({key: 1}).get(module, 0) == 1) == expected


def test_the_first_key_that_matches_decides() -> None:
    assert Pattern.of({"layers.*": 1, "q_proj": 2}).get("model.layers.1.q_proj", 0) == 1
    assert Pattern.of({"q_proj": 2, "layers.*": 1}).get("model.layers.1.q_proj", 0) == 2


def test_a_key_that_would_take_for_ever_takes_no_time() -> None:
    started = time.perf_counter()
    assert Pattern.of({"(a+)+b": 1}).get("a" * 100_000, 0) == 0
    assert time.perf_counter() - started < 1
