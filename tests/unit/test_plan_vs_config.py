"""Tensors that PEFT would ignore or miss by what its config says are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from server.adapters.content.signature import Shape
from tests.unit.test_plan import EMBEDDING, GOOD, E, H, N, Q, V, plan, problems

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
