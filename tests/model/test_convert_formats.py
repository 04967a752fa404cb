"""Adapters of mlx-lm and llama.cpp come out as PEFT's with the same logits, and what cannot is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.cli.convert.gguf import CONVERTED, read_gguf_adapter
from server.cli.convert.lora_folder import Delta, LoRATensors, write_lora_folder
from server.cli.convert.mlx import is_mlx_folder, read_mlx
from server.cli.folders import NotPublished
from tests.model.foreign_adapters import (
    FAMILIES_OF,
    PROVED,
    base,
    gguf_arrays,
    logits_of,
    make_peft,
    signature_of,
    write_gguf,
    write_mlx,
)

EXACT = 1e-5
"""Largest difference of logits, as a share of the largest, that the order of sums in float32 explains."""

LIMIT = 1 << 24
EVERYTHING = {"target_modules": "all-linear"}
WITH_EMBEDDING = {"target_modules": ["embed_tokens", "lm_head", "q_proj", "k_proj", "down_proj"]}


def converted_gguf(path: Path, family: str, out: Path) -> LoRATensors:
    """Convert for a family's random base, and write the folder."""
    model = base(family)
    tensors = read_gguf_adapter(path, max_bytes=LIMIT).convert(signature_of(model), model.config.get_text_config())
    out.mkdir()
    write_lora_folder(out, tensors, base_model="base")
    return tensors


def converted_mlx(folder: Path, family: str, out: Path) -> LoRATensors:
    tensors = read_mlx(folder, max_bytes=LIMIT).convert(signature_of(base(family)))
    out.mkdir()
    write_lora_folder(out, tensors, base_model="base")
    return tensors


def off(wanted: Path, got: Path, family: str) -> float:
    """The largest difference of logits, as a share of the largest; the adapter itself must change more."""
    model = base(family)
    plain, theirs, ours = logits_of(model), logits_of(model, wanted), logits_of(model, got)
    assert float((theirs - plain).abs().max()) > 0.05 * float(theirs.abs().max())
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("architecture", "family"), PROVED)
def test_a_gguf_lora_of_each_architecture_answers_as_under_peft(architecture: str, family: str, tmp_path: Path) -> None:
    """Heads of q and k differ in number in each of these bases: with q's number, k's rows would come back mixed up."""
    source = make_peft(base(family), tmp_path / "peft", **EVERYTHING)
    arrays = gguf_arrays(source, base(family), architecture)
    path = write_gguf(tmp_path / "a.gguf", arrays, architecture=architecture)
    converted_gguf(path, family, tmp_path / "out")
    assert off(source, tmp_path / "out", family) < EXACT
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_every_name_that_llama_cpp_gives_a_linear_or_a_norm_is_known() -> None:
    """gguf's own table of names is the oracle, for each architecture and each weight of a base of its family."""
    assert FAMILIES_OF.keys() == CONVERTED.keys()
    for architecture, family in PROVED:
        known = CONVERTED[architecture]
        assert base(family).config.model_type in known.model_types
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(kind, 3)
        weights = [name for name, _ in base(family).named_parameters() if re.search(r"layers\.1\..+\.weight", name)]
        for name in weights:
            theirs = names.get_name(name, try_suffixes=(".weight",))
            assert theirs is not None
            block = theirs.removeprefix("blk.1.").removesuffix(".weight")
            assert f"model.layers.1.{known.blocks[block]}.weight" == name


@pytest.mark.parametrize(("quantization", "allowed"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q5_1", 0.2)])
def test_a_gguf_lora_in_fewer_bits_answers_within_their_rounding(
    quantization: str, allowed: float, tmp_path: Path
) -> None:
    source = make_peft(base("llama"), tmp_path / "peft", r=32)
    arrays = gguf_arrays(source, base("llama"), "llama")
    path = write_gguf(tmp_path / "a.gguf", arrays, quantization=quantization)
    converted_gguf(path, "llama", tmp_path / "out")
    assert EXACT < off(source, tmp_path / "out", "llama") < allowed


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_lora_of_embedding_and_head_answers_as_under_peft(family: str, tmp_path: Path) -> None:
    source = make_peft(base(family), tmp_path / "peft", **WITH_EMBEDDING)
    path = write_gguf(tmp_path / "a.gguf", gguf_arrays(source, base(family), family), architecture=family)
    converted_gguf(path, family, tmp_path / "out")
    assert off(source, tmp_path / "out", family) < EXACT


def test_ranks_that_differ_stay_as_they_are_in_a_gguf(tmp_path: Path) -> None:
    """llama.cpp divides alpha by the rank of each tensor."""
    source = make_peft(base("llama"), tmp_path / "peft", rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 7})
    path = write_gguf(tmp_path / "a.gguf", gguf_arrays(source, base("llama"), "llama"))
    assert converted_gguf(path, "llama", tmp_path / "out").ranks[0] == 2
    assert off(source, tmp_path / "out", "llama") < EXACT


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_gguf_without_an_alpha_scales_nothing_as_in_llama_cpp(alpha: float | None, tmp_path: Path) -> None:
    source = make_peft(base("llama"), tmp_path / "peft", lora_alpha=4)
    path = write_gguf(tmp_path / "a.gguf", gguf_arrays(source, base("llama"), "llama"), alpha=alpha)
    converted_gguf(path, "llama", tmp_path / "out")
    assert off(source, tmp_path / "out", "llama") < EXACT


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_in_a_gguf_are_the_adapters_own(family: str, tmp_path: Path) -> None:
    """mergekit writes norms beside a delta. llama.cpp adds one to those of Gemma, and passes over them when it runs."""
    source = make_peft(base(family), tmp_path / "peft")
    weight = base(family).get_parameter("model.layers.1.input_layernorm.weight") + 0.5
    stored = {"blk.1.attn_norm.weight": weight + (1.0 if family == "gemma3" else 0.0)}
    arrays = gguf_arrays(source, base(family), family)
    path = write_gguf(tmp_path / "a.gguf", {**arrays, **stored}, architecture=family)
    tensors = converted_gguf(path, family, tmp_path / "out")
    assert "llama.cpp passes over" in tensors.notes[0]
    (name,) = tensors.norms
    assert name == "model.layers.1.input_layernorm"
    torch.testing.assert_close(tensors.norms[name], weight, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == [name]


A, B = torch.ones(2, 64), torch.ones(64, 2)
PAIR = {"blk.0.attn_q.weight.lora_a": A, "blk.0.attn_q.weight.lora_b": B}
GGUF_REFUSALS: dict[str, tuple[dict[str, Any], Mapping[str, torch.Tensor], str]] = {
    "activated": ({"more": {"adapter.alora.invocation_tokens": [1, 2]}}, PAIR, "activated LoRA"),
    "control vector": (
        {"architecture": "controlvector", "general_type": None, "adapter_type": None},
        {"direction.1": torch.ones(64)},
        "control vector",
    ),
    "a model": ({"general_type": "model"}, PAIR, "no adapter"),
    "no type": ({"general_type": None}, PAIR, "no adapter"),
    "another kind": ({"adapter_type": "ia3"}, PAIR, "only lora is converted"),
    "unknown key": ({"more": {"adapter.lora.rotation": "x"}}, PAIR, "adapter.lora.rotation"),
    "unknown architecture": ({"architecture": "mamba"}, PAIR, "general.architecture is 'mamba'"),
    "another architecture": ({"architecture": "qwen2"}, PAIR, "the base base is llama"),
    "other heads": ({"more": {"llama.attention.head_count_kv": 4}}, PAIR, "head_count_kv is 4, and the base's is 2"),
    "negative alpha": ({"alpha": -1.0}, PAIR, "adapter.lora.alpha"),
    "alpha not a number": ({"alpha": float("nan")}, PAIR, "adapter.lora.alpha"),
    "experts": ({}, {"blk.0.ffn_up_exps.weight.lora_a": torch.ones(2, 2, 64)}, "experts"),
    "strange tensor": ({}, {**PAIR, "blk.0.attn_rot_embd.weight.lora_a": A}, "no place"),
    "a name that is none": ({}, {**PAIR, "output.lora_a": A}, "no place"),
    "a norm's delta": ({}, {"blk.0.attn_norm.weight.lora_a": A}, "no place"),
    "whole weights": ({}, {**PAIR, "blk.0.attn_q.weight": B}, "no place"),
    "half a pair": ({}, {"blk.0.attn_q.weight.lora_a": A}, "no lora_b beside it"),
    "ranks apart": ({}, {**PAIR, "blk.0.attn_q.weight.lora_b": torch.ones(64, 3)}, "do not fit each other"),
    "odd rows": ({}, {**PAIR, "blk.0.attn_q.weight.lora_b": torch.ones(63, 2)}, "do not divide"),
    "a block twice": ({}, {**PAIR, "blk.00.attn_q.weight.lora_a": A}, "two tensors are the same one"),
    "nothing": ({}, {"blk.0.attn_norm.weight": torch.ones(64)}, "no lora_a and lora_b"),
}


@pytest.mark.parametrize("case", GGUF_REFUSALS)
def test_what_no_lora_can_be_made_of_is_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, tensors, words = GGUF_REFUSALS[case]
    path = write_gguf(tmp_path / "a.gguf", tensors, **fields)
    with pytest.raises(NotPublished, match=words):
        converted_gguf(path, "llama", tmp_path / "out")


def test_a_split_gguf_lora_is_converted_from_any_of_its_parts(tmp_path: Path) -> None:
    source = make_peft(base("llama"), tmp_path / "peft")
    write_gguf(tmp_path / "a.gguf", gguf_arrays(source, base("llama"), "llama"), max_tensors=9)
    parts = sorted(tmp_path.glob("a-*.gguf"))
    assert len(parts) > 2
    converted_gguf(parts[1], "llama", tmp_path / "out")
    assert off(source, tmp_path / "out", "llama") < EXACT
    with pytest.raises(NotPublished, match="setting max_adapter_bytes"):
        read_gguf_adapter(parts[1], max_bytes=max(part.stat().st_size for part in parts))


def test_a_gguf_beyond_the_limit_of_adapters_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", PAIR)
    with pytest.raises(NotPublished, match="setting max_adapter_bytes"):
        read_gguf_adapter(path, max_bytes=100)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", EVERYTHING),
        ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("qwen2", EVERYTHING),
        ("qwen2", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
        ("phi3", EVERYTHING),
    ],
)
def test_an_adapter_of_mlx_lm_answers_as_under_peft(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """An embedding that is tied to the head acts on both in mlx-lm, which PEFT does with ensure_weight_tying alone."""
    source = make_peft(base(family), tmp_path / "peft", **fields)
    folder = write_mlx(tmp_path / "mlx", source)
    if fields.get("ensure_weight_tying"):
        tensors = load_file(folder / "adapters.safetensors")
        save_file(
            {name: one for name, one in tensors.items() if "lm_head" not in name}, folder / "adapters.safetensors"
        )
    converted_mlx(folder, family, tmp_path / "out")
    assert off(source, tmp_path / "out", family) < EXACT


def test_scale_is_what_counts_in_mlx_lm_and_alpha_is_not(tmp_path: Path) -> None:
    source = make_peft(base("llama"), tmp_path / "peft")
    said = {"rank": 4, "scale": 1.5, "alpha": 16, "dropout": 0.1}
    tensors = converted_mlx(write_mlx(tmp_path / "mlx", source, lora_parameters=said), "llama", tmp_path / "out")
    assert off(source, tmp_path / "out", "llama") < EXACT
    assert "alpha 16 in adapter_config.json is not used" in tensors.notes[0]


def test_an_older_config_says_dora_otherwise_and_layers_too(tmp_path: Path) -> None:
    source = make_peft(base("llama"), tmp_path / "peft", use_dora=True)
    folder = write_mlx(tmp_path / "mlx", source, fine_tune_type=None, use_dora=True, lora_layers=16)
    converted_mlx(folder, "llama", tmp_path / "out")
    assert off(source, tmp_path / "out", "llama") < EXACT


def without_weights(folder: Path) -> None:
    (folder / "adapters.safetensors").rename(folder / "adapters.npz")


def with_file(name: str, data: bytes) -> Callable[[Path], None]:
    """Write one file anew."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def configured(**fields: Any) -> Callable[[Path], None]:
    """Change fields of the config; None takes one out."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        said = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))

    return change


def with_tensors(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    """Change tensors, ``__`` standing for a dot; None takes one out."""

    def change(folder: Path) -> None:
        path = folder / "adapters.safetensors"
        found = {**load_file(path), **{name.replace("__", "."): one for name, one in tensors.items()}}
        save_file({name: one for name, one in found.items() if one is not None}, path)

    return change


Q = "model__layers__0__self_attn__q_proj__"
MLX_REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "npz": (without_weights, "adapters.npz is of an early mlx-lm"),
    "whole layers": (configured(fine_tune_type="full"), "no adapter: fuse it"),
    "another type": (configured(fine_tune_type="oft"), "fine_tune_type is 'oft'"),
    "no parameters": (configured(lora_parameters=None), "lora_parameters is None"),
    "no scale": (configured(lora_parameters={"rank": 4, "alpha": 8}), "lora_parameters.scale is None"),
    "scale a text": (configured(lora_parameters={"rank": 4, "scale": "2"}), "scale is '2'"),
    "not JSON": (with_file("adapter_config.json", b"{"), "not valid JSON"),
    "a list": (with_file("adapter_config.json", b"[]"), "not a JSON object"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "not safetensors": (with_file("adapters.safetensors", b"x" * 99), "truncated"),
    "dora that is none": (configured(fine_tune_type="dora"), "no magnitude"),
    "a magnitude too many": (with_tensors(**{f"{Q}m": torch.ones(64)}), "there is a magnitude"),
    "switch layer": (
        with_tensors(**{f"{Q}lora_a": torch.ones(4, 2, 64), f"{Q}lora_b": torch.ones(4, 64, 2)}),
        "a delta for each expert",
    ),
    "a module twice": (
        with_tensors(
            language_model__layers__0__self_attn__q_proj__lora_a=torch.ones(64, 4),
            language_model__layers__0__self_attn__q_proj__lora_b=torch.ones(4, 64),
        ),
        "two modules of it are model.layers.0.self_attn.q_proj",
    ),
    "half a pair": (with_tensors(**{f"{Q}lora_b": None}), "has no lora_b"),
    "ranks apart": (with_tensors(**{f"{Q}lora_b": torch.ones(3, 64)}), "do not fit each other"),
    "a strange tensor": (with_tensors(model__norm__weight=torch.ones(64)), "no lora_a, lora_b or m: model.norm.weight"),
    "integers": (with_tensors(**{f"{Q}lora_a": torch.ones(64, 4, dtype=torch.int64)}), "must be floats"),
}


@pytest.mark.parametrize("case", MLX_REFUSALS)
def test_what_mlx_lm_leaves_and_peft_cannot_say_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, words = MLX_REFUSALS[case]
    folder = write_mlx(tmp_path / "mlx", make_peft(base("llama"), tmp_path / "peft", target_modules=["q_proj"]))
    change(folder)
    assert is_mlx_folder(folder)
    with pytest.raises(NotPublished, match=words):
        converted_mlx(folder, "llama", tmp_path / "out")


def test_dora_of_an_embedding_is_refused_because_its_magnitude_is_by_token(tmp_path: Path) -> None:
    source = make_peft(base("llama"), tmp_path / "peft", target_modules=["q_proj"], use_dora=True)
    folder = write_mlx(tmp_path / "mlx", source)
    name = "model__embed_tokens__"
    tensors = {f"{name}lora_a": torch.ones(200, 4), f"{name}lora_b": torch.ones(4, 64), f"{name}m": torch.ones(200)}
    with_tensors(**tensors)(folder)
    with pytest.raises(NotPublished, match="magnitude for each token"):
        converted_mlx(folder, "llama", tmp_path / "out")


def test_patterns_name_the_modules_that_differ_and_no_others(tmp_path: Path) -> None:
    def delta(rank: int, alpha: float) -> Delta:
        return Delta(torch.ones(rank, 6), torch.ones(4, rank), alpha)

    deltas = {"layers.1.q": delta(4, 8.0), "layers.11.q": delta(2, 4.0), "layers.2.q": delta(4, 8.0)}
    write_lora_folder(tmp_path, LoRATensors(deltas), base_model="base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["rank_pattern"] == {r"layers\.11\.q": 2} and config["alpha_pattern"] == {r"layers\.11\.q": 4.0}
