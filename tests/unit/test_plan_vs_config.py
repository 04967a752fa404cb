"""Tensors that PEFT would ignore or miss by what its config says are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from server.adapters.content.fit import Targets
from server.adapters.content.peft_config import parse_peft_config
from server.adapters.content.signature import Shape
from tests.unit.test_plan import EMBEDDING, GOOD, E, H, N, Q, V, plan, problems, renamed

ROWS: Mapping[str, Shape] = {f"{E}.token_adapter.trainable_tokens_delta": (1, 6)}


@pytest.mark.parametrize(
    ("tensors", "indices", "named"),
    [
        (GOOD, [5], "1 token, and"),
        (GOOD, {"embed": [5, 6]}, "2 tokens of embed, and"),
        (
            {**GOOD, f"{H}.token_adapter.trainable_tokens_delta": (1, 6)},
            {"lm_head": [5], "embed": [6]},
            "1 token of embed, and",
        ),
        ({**GOOD, **ROWS}, {"embed": [5], "lm_head": [6]}, "1 token of lm_head, and"),
        (ROWS, {"model.embed": [5], "ghost": [5]}, "1 token of ghost, and"),
    ],
)
def test_tokens_whose_rows_are_not_in_the_file_are_refused(
    tensors: Mapping[str, Shape], indices: Any, named: str
) -> None:
    """The adapter was served without its rows; PEFT raises a KeyError."""
    [problem] = problems(tensors, trainable_token_indices=indices)
    assert f"trainable_token_indices in adapter_config.json names {named}" in problem


def test_a_tied_head_has_the_rows_of_the_embedding() -> None:
    """PEFT saves one tensor where both are named with the same tokens."""
    assert set(plan(ROWS, trainable_token_indices={"embed": [5], "lm_head": [5]}).parts) == {"model.embed", "lm_head"}


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({**GOOD, f"{V}.weight": (2, 6)}, "model.layers.0.v_proj.weight"),
        ({**EMBEDDING, f"{E}.weight": (20, 6)}, "model.embed.weight"),
        ({f"{H}.lora_A.weight": (2, 6), f"{H}.lora_B.weight": (20, 2), f"{H}.weight": (20, 6)}, "lm_head.weight"),
    ],
)
def test_a_weight_beside_a_delta_has_the_name_that_peft_gives_it(tensors: dict[str, Shape], name: str) -> None:
    """``q_proj.weight`` beside q_proj's LoRA took the place of the base's weight; PEFT ignores it."""
    [problem] = problems(tensors)
    assert problem.startswith(f"it brings {name} beside a delta of that module, which PEFT would ignore")
    renamed = {key.replace(f"{name}", name.replace("weight", "base_layer.weight")): tensors[key] for key in tensors}
    assert plan(renamed).parts


def test_a_weight_of_a_module_without_a_delta_and_a_bias_beside_one_are_served() -> None:
    found = plan({**GOOD, f"{N}.weight": (6,), f"{H}.weight": (20, 6), f"{Q}.bias": (4,)}, bias="all")
    assert {name: set(part.own) for name, part in found.parts.items() if part.own} == {
        "model.norm": {"weight"}, "lm_head": {"weight"}, "model.layers.0.q_proj": {"bias"}, "model.embed": {"weight"},
    }  # fmt: skip


MODULES = [
    f"{prefix}layers.{layer}.{name}"
    for prefix in ("", "model.", "model.language_model.")
    for layer in (0, 1, 12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.1.q_proj", "mlp.down_proj")
]
MODULES += ["lm_head", "model.embed_tokens", "transformer.h.1.attn.c_attn", "score.1.q_proj", "q_proj", "xq_proj"]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj", "self_attn", "layers.1.self_attn.q_proj", "c_attn"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0, 12]},
        {"target_modules": ["q_proj", "c_attn", "embed_tokens"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "model.layers.12.mlp.down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["experts", "layers"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "v_proj", "mlp"]},
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "modules_to_save": ["lm_head", "layers.1", "mlp", "attn"]},
    ],
)
def test_a_list_names_the_modules_that_it_names_in_peft(fields: dict[str, Any]) -> None:
    ours, theirs = Targets(parse_peft_config({"peft_type": "LORA", **fields})), LoraConfig(**fields)
    expected = {name for name in MODULES if check_target_module_exists(theirs, name)}
    assert {name for name in MODULES if ours.has(name)} == expected
    assert 0 < len(expected) < len(MODULES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_proj"]}, "by target_modules in"),
        ({"target_modules": ["q_proj"], "exclude_modules": "x+"}, "by target_modules in"),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.v_proj"]},
            "by target_modules and exclude_modules in",
        ),
        (
            {"target_modules": ["model.layers.0.q_proj", "v_proj"], "layers_to_transform": [1, 2]},
            "by target_modules and layers_to_transform in",
        ),
    ],
)
def test_tensors_of_a_module_that_the_lists_leave_out_are_refused(fields: dict[str, Any], words: str) -> None:
    """The server played them all and PEFT those that the config names, and ``adapters check`` found no difference."""
    [problem] = problems(GOOD, **fields)
    assert problem.startswith(f"it has deltas of 2 modules, and {words} adapter_config.json PEFT would load those of 1")
    assert "ignore the tensors of model.layers.0.v_proj: correct the config" in problem


def test_a_delta_of_a_module_that_is_saved_whole_is_refused() -> None:
    tensors = {**GOOD, f"{V}.modules_to_save.weight": (2, 6)}
    [problem] = problems(tensors, target_modules=["q_proj", "v_proj"], modules_to_save=["v_proj"])
    assert "by target_modules and modules_to_save in adapter_config.json" in problem


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ".*q_proj"},
        {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
        {"target_modules": ["layers.0._checkpoint_wrapped_module.q_proj", "_orig_mod.model.layers.0.v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [3], "layers_pattern": "(a+)+$"},
    ],
)
def test_what_no_list_leaves_out_is_served(fields: dict[str, Any]) -> None:
    """An expression is not evaluated, and a parameter is named by another field."""
    assert len(plan(GOOD, **fields).parts) == 2


@pytest.mark.parametrize("head", ["model.", "model.language_model."])
def test_lists_are_of_the_names_in_the_base_and_in_the_model_that_was_trained(head: str) -> None:
    tensors = renamed("base_model.model.model.language_model.")
    assert len(plan(tensors, target_modules=[f"{head}layers.0.q_proj", f"{head}layers.0.v_proj"]).parts) == 2


def test_a_tied_head_has_its_delta_by_the_name_of_the_embedding() -> None:
    tensors = {**EMBEDDING, f"{H}.lora_A.weight": (2, 6), f"{H}.lora_B.weight": (20, 2)}
    assert set(plan(tensors, target_modules=["embed"], ensure_weight_tying=True).parts) == {"model.embed", "lm_head"}
    assert "ignore the tensors of lm_head" in problems(tensors, target_modules=["embed"])[0]


@pytest.mark.parametrize("layers", ["0", [0, "1"], {"0": 1}, [-1], [True], 1.5])
def test_layers_that_are_no_numbers_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers_to_transform is .*: it must be a list of layer numbers"):
        parse_peft_config({"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": layers})
