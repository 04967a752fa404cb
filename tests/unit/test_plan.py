"""Tensors that do not fit the base or the config are refused with every reason; bytes are known from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from base_files.safetensors_header import TensorEntry
from server.adapters.content.peft_config import parse_peft_config
from server.adapters.content.plan import AdapterPlan, PlanError, make_plan
from server.adapters.content.signature import BaseSignature, ModuleShape, Shape, embedding, linear
from server.adapters.content.tensor_names import ModuleNames

EXPERTS = ModuleShape("rows", {"gate_up_proj": (3, 10, 6), "bias": (3, 10), "down_proj": (3, 6, 5)}, axis=0)
BASE = BaseSignature(
    "base",
    f"sha256:{'a' * 64}",
    {
        "model.embed": embedding(20, 6),
        "model.layers.0.q_proj": linear(6, 4, bias=True),
        "model.layers.0.v_proj": linear(6, 2),
        "model.layers.0.experts": EXPERTS,
        "model.norm": ModuleShape("rows", {"weight": (6,)}),
        "lm_head": linear(6, 20),
    },
    vocab_size=20,
    tied={"lm_head": "model.embed"},
    others=frozenset({"model.layers.0.conv"}),
)
Q, V, X, E, N, H = (f"base_model.model.{name}" for name in (
    "model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.0.experts", "model.embed", "model.norm", "lm_head",
))  # fmt: skip
GOOD: Mapping[str, Shape] = {
    f"{Q}.lora_A.weight": (2, 6),
    f"{Q}.lora_B.weight": (4, 2),
    f"{V}.lora_A.weight": (2, 6),
    f"{V}.lora_B.weight": (2, 2),
}
EMBEDDING: Mapping[str, Shape] = {f"{E}.lora_embedding_A": (2, 20), f"{E}.lora_embedding_B": (6, 2)}


def plan(tensors: Mapping[str, Shape], *, dtype: str = "F32", **fields: Any) -> AdapterPlan:
    entries = {name: TensorEntry(name, dtype, shape, 0, 0) for name, shape in tensors.items()}
    config = parse_peft_config({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields})
    return make_plan(entries, config, BASE, max_rank=8)


def problems(tensors: Mapping[str, Shape], **fields: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan(tensors, **fields)
    assert str(caught.value) == caught.value.problems[0]
    return caught.value.problems


def without(name: str) -> dict[str, Shape]:
    return {key: shape for key, shape in GOOD.items() if key != name}


def test_a_plan_says_rank_modules_and_bytes() -> None:
    found = plan(GOOD)
    assert (found.rank, found.composable) == (2, True)
    assert found.modules == ("model.layers.0.q_proj", "model.layers.0.v_proj")
    assert found.num_bytes == 4 * 2 * (6 + 4 + 6 + 2)


@pytest.mark.parametrize(
    ("tensors", "fields", "num_bytes"),
    [
        ({f"{Q}.lora_B.bias": (4,), f"{V}.lora_B.bias": (2,)}, {"lora_bias": True}, 4 * (4 + 2)),
        # DoRA's scale, and a shift where the base has a bias
        ({f"{Q}.lora_magnitude_vector": (4,), f"{V}.lora_magnitude_vector": (2,)}, {"use_dora": True}, 4 * (4 + 4 + 2)),
        ({f"{Q}.base_layer.bias": (4,)}, {"bias": "all"}, 4 * 4),
        ({f"{N}.weight": (6,)}, {"modules_to_save": ["norm"]}, 4 * 6),
        (EMBEDDING, {}, 4 * 2 * 26),
        # a weight written into the base's own is the tied head's too, and in memory once
        ({**EMBEDDING, f"{E}.base_layer.weight": (20, 6)}, {}, 4 * (2 * 26 + 20 * 6)),
        (
            {f"{E}.token_adapter.trainable_tokens_delta": (3, 6)},
            {"trainable_token_indices": [7, 1, 19]},
            3 * (4 * 6 + 8),
        ),
        (
            {f"{X}.lora_A.weight": (6, 5), f"{X}.lora_B.weight": (6, 6)},
            {"target_parameters": ["experts.down_proj"]},
            4 * 2 * 3 * (5 + 6),
        ),
    ],
)
def test_the_bytes_of_each_kind_of_tensor(tensors: dict[str, Shape], fields: dict[str, Any], num_bytes: int) -> None:
    assert plan({**GOOD, **tensors}, **fields).num_bytes == plan(GOOD).num_bytes + num_bytes


def test_the_rows_of_tokens_reach_a_tied_head() -> None:
    found = plan({f"{E}.token_adapter.trainable_tokens_delta": (2, 6)}, trainable_token_indices=[3, 4])
    assert set(found.parts) == {"model.embed", "lm_head"}
    assert (found.rank, found.composable) == (0, False)


def test_a_module_saved_whole_is_not_its_tied_partners() -> None:
    found = plan({f"{E}.weight": (20, 6), **GOOD}, modules_to_save=["embed"])
    assert "lm_head" not in found.parts


def test_nested_deltas_are_those_of_the_parameters_from_the_inside() -> None:
    tensors = {
        f"{X}.base_layer.base_layer.lora_A.weight": (6, 6), f"{X}.base_layer.base_layer.lora_B.weight": (10, 6),
        f"{X}.base_layer.lora_A.weight": (2, 10), f"{X}.base_layer.lora_B.weight": (3, 2),
        f"{X}.lora_A.weight": (3, 5), f"{X}.lora_B.weight": (6, 3),
    }  # fmt: skip
    fields: dict[str, Any] = {
        "target_parameters": ["gate_up_proj", "bias", "down_proj"],
        "rank_pattern": {"down_proj": 1},
    }
    parameters = plan(tensors, **fields).parts["model.layers.0.experts"].parameters
    assert {name: (one.rank, one.scaling, one.b.shape[0]) for name, one in parameters.items()} == {
        "gate_up_proj": (2, 2.0, 10), "bias": (2, 2.0, 3), "down_proj": (1, 4.0, 6),
    }  # fmt: skip


REFUSED: list[tuple[Mapping[str, Shape], dict[str, Any], str]] = [
    ({}, {}, "it holds no tensors"),
    (without(f"{V}.lora_B.weight"), {}, "model.layers.0.v_proj has no tensor B of its delta"),
    ({f"{E}.lora_embedding_B": (6, 2)}, {}, "model.embed has no tensor A of its delta"),
    ({**GOOD, "x.ghost.lora_A.weight": (2, 6)}, {}, "the base base has no module x.ghost"),
    (
        {"model.layers.0.experts.3.w1.lora_A.weight": (2, 6)},
        {},
        "written for transformers 4, whose experts were modules",
    ),
    ({**GOOD, "model.layers.0.conv.lora_A.weight": (2, 6)}, {}, "do not see every row of a batch"),
    (
        {**GOOD, f"{Q}.lora_A.default.weight": (2, 6)},
        {},
        f"{Q}.lora_A.default.weight (twice): {Q}.lora_A.weight is the same tensor of model.layers.0.q_proj",
    ),
    ({**GOOD, "prompt_embeddings": (2, 6)}, {}, "no part of a LoRA adapter for this base: prompt_embeddings"),
    ({**GOOD, f"{Q}.lora_B.weight": (5, 2)}, {}, "do not fit the base base: model.layers.0.q_proj (A [2, 6], B [5, 2]"),
    ({**GOOD, f"{Q}.lora_A.weight": (3, 6)}, {}, "the base needs [3, 6] and [4, 3]"),
    ({**GOOD, f"{Q}.lora_A.weight": ()}, {}, "do not fit the base"),
    ({f"{Q}.lora_A.weight": (9, 6), f"{Q}.lora_B.weight": (4, 9)}, {"r": 9}, "its rank is 9; the limit is 8"),
    (GOOD, {"r": 4}, "model.layers.0.q_proj have rank 2, and adapter_config.json says 4"),
    (GOOD, {"rank_pattern": {"v_proj": 1}}, "model.layers.0.v_proj have rank 2, and adapter_config.json says 1"),
    (
        GOOD,
        {"target_modules": ["q_proj", "lm_head"]},
        "target_modules in adapter_config.json names lm_head, and there is",
    ),
    (GOOD, {"modules_to_save": ["norm"]}, "modules_to_save in adapter_config.json names norm, and there is no tensor"),
    (GOOD, {"use_dora": True}, "use_dora in adapter_config.json is true, and there is no magnitude for"),
    (GOOD, {"lora_bias": True}, "lora_bias in adapter_config.json is true, and there is no bias of B for"),
    ({**GOOD, f"{Q}.lora_B.bias": (4,)}, {}, "lora_bias in adapter_config.json is false, and there is a bias of B for"),
    ({**GOOD, f"{Q}.lora_magnitude_vector": (4,)}, {}, "use_dora in adapter_config.json is false"),
    (
        {**without(f"{V}.lora_A.weight"), f"{Q}.lora_magnitude_vector": (5,)},
        {"use_dora": True},
        "model.layers.0.q_proj (magnitude [5]; the base needs [4])",
    ),
    ({f"{N}.lora_magnitude_vector": (6,)}, {"use_dora": True}, "without A and B for model.norm"),
    (
        {**GOOD, f"{V}.base_layer.bias": (2,)},
        {"bias": "all"},
        "model.layers.0.v_proj.bias, which the base does not have",
    ),
    ({**GOOD, f"{Q}.base_layer.bias": (3,)}, {"bias": "all"}, "model.layers.0.q_proj.bias [3]; the base needs [4]"),
    ({**GOOD, f"{N}.weight": (7,)}, {}, "model.norm.weight [7]; the base needs [6]"),
    ({f"{H}.weight": (24, 6)}, {}, "lm_head.weight of 24 tokens, a vocabulary larger than the base's 20"),
    ({**EMBEDDING, f"{E}.base_layer.weight": (9, 6)}, {}, "a vocabulary smaller than the base's 20"),
    (
        {f"{N}.lora_A.weight": (2, 6), f"{N}.lora_B.weight": (6, 2)},
        {},
        "model.norm has a delta, but is no linear layer",
    ),
    (
        {f"{X}.lora_A.weight": (6, 5), f"{X}.lora_B.weight": (6, 6)},
        {},
        "target_parameters in adapter_config.json names no parameter",
    ),
    (
        {f"{X}.lora_A.weight": (6, 5), f"{X}.lora_B.weight": (6, 6)},
        {"target_parameters": ["gate_up_proj", "down_proj"]},
        "has deltas for 1 parameters, and target_parameters in adapter_config.json names 2 of it",
    ),
    (
        {f"{X}.lora_A.weight": (6, 6), f"{X}.lora_B.weight": (6, 6)},
        {"target_parameters": ["down_proj"]},
        "model.layers.0.experts.down_proj (A [6, 6], B [6, 6]; the base needs [6, 5] and [6, 6])",
    ),
    ({f"{Q}.base_layer.lora_A.weight": (2, 6)}, {}, "nested deltas"),
    ({f"{E}.token_adapter.trainable_tokens_delta": (2, 6)}, {"trainable_token_indices": [1]}, "names 1 tokens of 6"),
    (
        {f"{E}.token_adapter.trainable_tokens_delta": (1, 6)},
        {"trainable_token_indices": [20]},
        "trainable_token_indices names token 20; model.embed has 20",
    ),
    ({f"{E}.token_adapter.trainable_tokens_delta": (1, 6)}, {}, "names 0 tokens"),
    (
        {f"{N}.token_adapter.trainable_tokens_delta": (1, 6)},
        {"trainable_token_indices": [1]},
        "no embedding and no head",
    ),
    (
        {**EMBEDDING, f"{E}.token_adapter.trainable_tokens_delta": (1, 6)},
        {"trainable_token_indices": [1]},
        "rows for tokens of model.embed and another change of it",
    ),
]


@pytest.mark.parametrize(("tensors", "fields", "words"), REFUSED)
def test_what_does_not_fit_is_refused(tensors: Mapping[str, Shape], fields: dict[str, Any], words: str) -> None:
    assert words in "\n".join(problems(tensors, **fields))


def test_numbers_that_are_no_floats_are_refused() -> None:
    assert f"some are not: {Q}.lora_A.weight (I32)" in problems(GOOD, dtype="I32")[0]


def test_every_problem_is_told_and_of_each_kind_three_names() -> None:
    ghosts = {f"x.ghost{n}.lora_A.weight": (2, 6) for n in range(5)}
    found = problems({**GOOD, **ghosts, "what": (1,), f"{Q}.lora_A.weight": (2, 7)}, target_modules=["lm_head"])
    assert len(found) == 5
    assert "x.ghost0, x.ghost1, x.ghost2 and 2 more" in found[1]


WRAPPED: Mapping[str, str] = {
    "torch.compile inside of PEFT": "base_model.model._orig_mod.model.",
    "torch.compile around PEFT": "_orig_mod.base_model.model.model.",
    "PEFT twice": "base_model.model.base_model.model.model.",
    "DDP": "module.base_model.model.model.",
    "DDP and torch.compile": "_orig_mod.module.base_model.model.model.",
    "FSDP": "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.model.",
    "Fabric": "_forward_module.base_model.model.model.",
    "TRL with a value head": "pretrained_model.base_model.model.model.",
    "a multimodal model of transformers 5": "base_model.model.model.language_model.",
    "a multimodal model of transformers 4": "base_model.model.language_model.model.",
    "the model without its head": "base_model.model.",
    "no prefix": "model.",
}


def renamed(prefix: str, tensors: Mapping[str, Shape] = GOOD) -> dict[str, Shape]:
    """The tensors of the base's ``model.`` under another prefix."""
    return {prefix + name.removeprefix("base_model.model.model."): shape for name, shape in tensors.items()}


@pytest.mark.parametrize("prefix", WRAPPED.values(), ids=WRAPPED)
def test_the_same_modules_inside_of_a_wrapper_are_served(prefix: str) -> None:
    """Such names were refused with "was it trained on another base?", and the weights are the base's own modules'."""
    found = plan(renamed(prefix))
    assert found.modules == plan(GOOD).modules
    assert list(found.names.values()) == list(GOOD)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: name.replace("q_proj.", "q_proj._fsdp_wrapped_module."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".my-run_2.weight"),
        lambda name: name.replace(".weight", ".default._fsdp_wrapped_module.weight"),
    ],
)
def test_wrappers_of_layers_and_an_adapters_name_are_no_part_of_a_name(change: Callable[[str], str]) -> None:
    found = plan({change(name): shape for name, shape in GOOD.items()})
    assert found.modules == plan(GOOD).modules
    assert list(found.names.values()) == list(GOOD)


@pytest.mark.parametrize(
    ("name", "plain", "shape", "fields"),
    [
        (f"{E}.lora_embedding_A.run", f"{E}.lora_embedding_A", (2, 20), {}),
        (
            f"{E}.token_adapter.trainable_tokens_delta.run", f"{E}.token_adapter.trainable_tokens_delta", (1, 6),
            {"trainable_token_indices": [3]},
        ),
        (f"{N}.modules_to_save.run.weight", f"{N}.weight", (6,), {"modules_to_save": ["norm"]}),
    ],
)  # fmt: skip
def test_an_adapters_name_in_other_tensors(name: str, plain: str, shape: Shape, fields: dict[str, Any]) -> None:
    others = {f"{E}.lora_embedding_B.run": (6, 2)} if "embedding" in name else {}
    found = plan({**GOOD, **others, name: shape}, **fields)
    assert found.names[name] == plain


def test_a_saved_modules_own_copy_of_the_base_is_passed_over() -> None:
    tensors = {f"{N}.modules_to_save.default.weight": (6,), f"{N}.original_module.weight": (6,)}
    assert set(plan({**GOOD, **tensors}, modules_to_save=["norm"]).parts["model.norm"].own) == {"weight"}


def test_patterns_are_of_the_names_in_the_model_that_was_trained() -> None:
    """The delta of a multimodal model's adapter must not lose the alpha that its config gives to its own names."""
    fields: dict[str, Any] = {"alpha_pattern": {r"model\.language_model\.layers\.0\.q_proj": 8}}
    parts = plan(renamed("base_model.model.model.language_model."), **fields).parts
    scalings = {name: part.low_rank.scaling for name, part in parts.items() if part.low_rank is not None}
    assert scalings == {"model.layers.0.q_proj": 4.0, "model.layers.0.v_proj": 2.0}


def test_tokens_are_of_the_names_in_the_model_that_was_trained() -> None:
    name = "base_model.model.language_model.model.embed.token_adapter.trainable_tokens_delta"
    found = plan({name: (2, 6)}, trainable_token_indices={"language_model.model.embed": [3, 4]})
    assert set(found.parts) == {"model.embed", "lm_head"}


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("base_model.model.policy.model.", "have policy before the base's modules (policy.model.layers.0.q_proj"),
        ("base_model.model.talker.model.", "have talker before"),
        ("base_model.model.model.vision_tower.encoder.", "have model.vision_tower.encoder before"),
    ],
)
def test_a_wrapper_that_may_hold_another_model_is_named(prefix: str, wrapper: str) -> None:
    [problem] = problems(renamed(prefix))
    assert wrapper in problem
    assert "another base" not in problem
    assert "save the adapter of the language model alone" in problem


def test_names_of_many_parts_take_no_longer_by_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part was taken for the end of a wrapper: a header of 16 MB took the adapters' thread minutes."""
    find, looked_up = ModuleNames.find, []

    def counted(names: ModuleNames, name: str) -> str | None:
        looked_up.append(name)
        return find(names, name)

    monkeypatch.setattr(ModuleNames, "find", counted)
    assert "has no module" in problems({f"base_model.model.{'a.' * 230}m.lora_A.weight": (1, 1)})[0]
    assert len(looked_up) < 30


def test_a_module_inside_and_outside_of_a_wrapper_is_there_twice() -> None:
    both = {**GOOD, **renamed("base_model.model._orig_mod.model.")}
    assert "base_model.model._orig_mod.model.layers.0.q_proj.lora_A.weight (twice)" in problems(both)[0]


def test_a_name_that_two_modules_of_the_base_could_have_is_nobodys() -> None:
    modules = {"model.layers.0.q_proj": linear(6, 4), "model.language_model.layers.0.q_proj": linear(6, 4)}
    base = BaseSignature("base", f"sha256:{'a' * 64}", modules)
    entries = {name: TensorEntry(name, "F32", shape, 0, 0) for name, shape in renamed("language_model.").items()}
    with pytest.raises(PlanError, match=r"has no module language_model\.layers\.0\.q_proj"):
        make_plan(entries, parse_peft_config({"peft_type": "LORA", "r": 2}), base, max_rank=8)


def test_two_adapters_in_one_file_are_named() -> None:
    other = {name.replace(".weight", ".other.weight"): shape for name, shape in GOOD.items()}
    first = {name.replace(".weight", ".first.weight"): shape for name, shape in GOOD.items()}
    assert "it holds several adapters (first, other): save one alone" in problems({**first, **other})[0]
