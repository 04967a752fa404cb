"""What changes a base is undone when it is closed, and no other model of the process is changed at all."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.llama import modeling_llama

from base_files.source import FolderBase
from base_files.stock_model import stock_model
from cpu_kernels.kernels import Kernels, choose_linear
from server.integrity import IntegrityError
from server.lora.delta import LoRADelta
from server.lora.weights import LoRAWeights
from server.model import loader
from server.model.attention.batched import BatchedAttention
from server.model.fused_ops import RotaryEmbedding
from server.model.loader import Base, load_base
from server.model.patches import ModelPatches, with_globals
from server.model.quantizer import quantizing
from server.model.runner import ModelRunner
from server.quantization.int8_modules import Int8Linear
from server.sequence import Batch, LoRARequest, SamplingParams, Segment
from server.sequence import Sequence as Generation
from tests.model.families import FAMILIES, build_from
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

_CACHED = "_cached_value"
"""What transformers itself keeps on classes."""
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base of a family, by ``indirect``, with a tokenizer."""
    config = copy.deepcopy(FAMILIES[request.param])
    config.vocab_size = VOCAB_SIZE
    build_from(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, quantization: str = "none", dtype: str = "float32") -> Base:
    return load_base(str(folder), name="tiny", device="cpu", dtype=dtype, max_model_len=64, quantization=quantization)


def run(base: Base) -> tuple[ModelRunner, torch.Tensor]:
    """Steps with an adapter on every other linear, so that modules are wrapped and layers recorded."""
    runner, deltas = ModelRunner.of(base, num_slots=2), {}
    for name, shape in list(base.signature.modules.items())[::2]:
        if shape.kind == "linear":
            inside, outside = shape.size
            deltas[name] = LoRADelta("linear", torch.ones(2, inside).t() * 0.01, torch.ones(2, outside) * 0.01)
    runner.add_adapter("digest", LoRAWeights(deltas, 1.0))
    prompt = Generation(0, tuple(range(3, 15)), 20, SamplingParams(), (LoRARequest("digest"),))
    logits = [runner.run(Batch((Segment(prompt, 0, 0, 12),)))[0]]
    for number in range(4):
        token = Generation(1 + number, (5,) * 20, 20, SamplingParams(), (LoRARequest("digest"),))
        logits.append(runner.run(Batch((Segment(token, 0, 12 + number, 1),)))[0])
    return runner, torch.cat(logits)


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> None:
    """Models of other test files that wait for the garbage collector would leave the attention table meanwhile."""
    gc.collect()


def namespaces() -> Mapping[tuple[str, str], Any]:
    """Every attribute of transformers' modelling modules and their classes, and its table of attention functions."""
    found: dict[tuple[str, str], Any] = {
        ("attention", name): function for name, function in AttentionInterface().items()
    }
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.models."):
            for name, value in list(vars(module).items()):
                found[module_name, name] = value
                if isinstance(value, type) and issubclass(value, nn.Module):
                    attributes = vars(value).items()
                    found |= {(f"{module_name}.{name}", attribute): value for attribute, value in attributes}
    return {key: value for key, value in found.items() if not key[1].endswith(_CACHED)}


def changed(before: Mapping[tuple[str, str], Any]) -> list[tuple[str, str]]:
    now = namespaces()
    return [key for key in before.keys() | now.keys() if key not in now or before.get(key) is not now[key]]


def structure(model: nn.Module) -> Mapping[str, tuple[type, frozenset[str]]]:
    """Each module's type, and the attributes that it has of its own."""
    return {name: (type(module), frozenset(module.__dict__)) for name, module in model.named_modules()}


def is_stock(model: PreTrainedModel, folder: Path) -> bool:
    stock = stock_model(FolderBase(folder))
    logits_of(stock)  # some modules keep what a forward pass computed
    implementation = model.config._attn_implementation == stock.config._attn_implementation
    return implementation and structure(model) == structure(stock)


@torch.inference_mode()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batched", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("folder", ["llama", "gemma2", "gpt_neox", "phi3_longrope"], indirect=True)
def test_a_closed_base_is_the_stock_model(
    folder: Path, batched: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-NeoX rotates a part of each head; Phi-3's frequencies depend on length."""
    if batched:
        monkeypatch.setattr(loader, "_device_and_attention", lambda device: (torch.device(device), BatchedAttention))
    stock, before = stock_model(FolderBase(folder), getattr(torch, dtype)), namespaces()
    base = load(folder, dtype=dtype)
    run(base)
    assert not is_stock(base.model, folder)
    base.close()
    assert base.patches.names == []
    assert is_stock(base.model, folder)
    assert torch.equal(logits_of(base.model), logits_of(stock))
    assert changed(before) == []


@pytest.mark.parametrize("folder", ["llama", "gemma2"], indirect=True)
def test_a_closed_int8_base_has_stock_modules_without_the_weights_that_became_integers(folder: Path) -> None:
    stock, before = stock_model(FolderBase(folder)), namespaces()
    base = load(folder, "int8")
    run(base)
    base.close()
    assert is_stock(base.model, folder)
    expected = dict(stock.named_parameters())
    kept = dict(base.model.named_parameters())
    assert kept.keys() == {name for name, parameter in expected.items() if parameter.ndim < 2}
    for name, parameter in kept.items():
        assert torch.equal(parameter, expected[name].float())
    assert changed(before) == []


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
def test_a_closed_int8_base_raises_when_it_is_called(folder: Path) -> None:
    """Its weights were on the meta device, with which torch computes from memory that nobody has written."""
    base = load(folder, "int8")
    base.close()
    with pytest.raises(TypeError):
        logits_of(base.model)
    for module in base.model.modules():
        if type(module) is nn.Linear:
            with pytest.raises(TypeError):
                module(torch.ones(1, module.in_features))


@torch.inference_mode()
def test_a_linear_with_two_names_becomes_integers_under_both_and_once() -> None:
    """Under its second name it stayed stock, without a weight, and gave what lay in the memory of the process."""
    model, patches = build_from(FAMILIES["llama"]), ModelPatches()
    attention, mlp = model.get_submodule("model.layers.0.self_attn"), model.get_submodule("model.layers.0.mlp")
    shared = attention.get_submodule("o_proj")
    mlp.add_module("gate_proj", nn.Sequential(shared, shared, mlp.get_submodule("gate_proj")))
    expected = logits_of(model)
    with quantizing(model, Kernels(linear=choose_linear()), torch.float32, patches=patches):
        logits_of(model)
    names = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj.0", "model.layers.0.mlp.gate_proj.1")
    replaced = [model.get_submodule(name) for name in names]
    assert isinstance(replaced[0], Int8Linear) and all(module is replaced[0] for module in replaced)
    assert (logits_of(model) - expected).abs().max() < 0.5 * expected.abs().max()
    patches.undo()
    assert all(model.get_submodule(name) is shared for name in names)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("folder", ["llama", "gemma2", "gpt_neox"], indirect=True)
def test_a_model_loaded_beside_a_base_is_stock(folder: Path, quantization: str) -> None:
    """Once the rotary embedding was replaced in transformers' module, for oracles as well."""
    expected, before = logits_of(stock_model(FolderBase(folder))), namespaces()
    base = load(folder, quantization)
    run(base)
    beside = stock_model(FolderBase(folder))
    assert torch.equal(logits_of(beside), expected)
    assert changed(before) == [("attention", base.attention.name)]
    base.close()


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("folder", ["llama", "phi3"], indirect=True)
def test_of_two_bases_one_is_closed_and_the_other_works_on(folder: Path, quantization: str) -> None:
    first, second = load(folder, quantization), load(folder, quantization)
    expected = run(first)[1]
    assert torch.equal(run(second)[1], expected)
    first.close()
    assert torch.equal(run(second)[1], expected)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_second_runner_of_a_base_finds_no_adapters_of_the_first(folder: Path) -> None:
    base = load(folder)
    first, expected = run(base)
    second, found = run(base)
    assert torch.equal(found, expected)
    assert base.patches.names.count("runner") == 1
    del first, second


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_runner_that_was_replaced_changes_no_module_any_more(folder: Path) -> None:
    """An adapter that it was given changed what the new runner computed."""
    base = load(folder)
    first = run(base)[0]
    second, expected = run(base)
    name = next(name for name, shape in base.signature.modules.items() if shape.kind == "linear")
    inside, outside = base.signature.modules[name].size
    weights = LoRAWeights({name: LoRADelta("linear", torch.ones(2, inside).t(), torch.ones(2, outside))}, 1.0)
    before = structure(base.model)
    with pytest.raises(IntegrityError, match="closed, or has a new runner"):
        first.add_adapter("other", weights)
    first.remove_adapter("digest")
    prompt = Generation(0, tuple(range(3, 15)), 20, SamplingParams(), (LoRARequest("digest"),))
    with pytest.raises(IntegrityError, match="not in memory"):
        first.run(Batch((Segment(prompt, 0, 0, 12),)))
    assert structure(base.model) == before
    assert first.bank.num_bytes == 0
    assert torch.equal(second.run(Batch((Segment(prompt, 0, 0, 12),)))[0], expected[:1])


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_attention_modules_call_our_rotary_embedding_and_no_other_model_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, stock = load(folder), stock_model(FolderBase(folder))
    calls: list[int] = []
    rotate = RotaryEmbedding.__call__

    def counted(self: RotaryEmbedding, *args: Any, **named: Any) -> Any:
        calls.append(1)
        return rotate(self, *args, **named)

    monkeypatch.setattr(RotaryEmbedding, "__call__", counted)
    logits_of(stock)
    assert not calls
    run(base)
    assert calls


class _Child(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_patch_that_begins_again_is_undone_first_with_all_that_came_after() -> None:
    parent, patches = nn.Sequential(nn.Identity(), nn.Identity()), ModelPatches()
    stock = list(parent)
    patches.begin("first")
    patches.replace_child(parent, "0", _Child())
    patches.begin("second")
    patches.replace_child(parent, "1", _Child())
    patches.set_attribute(parent, "note", "ours")
    patches.begin("second")
    assert patches.names == ["first"]
    assert parent[1] is stock[1] and "note" not in parent.__dict__
    patches.replace_child(parent, "1", _Child())
    patches.replace_child(parent, "1", _Child())
    patches.begin("first")
    assert patches.names == [] and list(parent) == stock
    patches.undo()


def test_an_attribute_that_was_there_comes_back() -> None:
    module, patches = nn.Identity(), ModelPatches()
    module.__dict__["kind"] = "stock"
    patches.set_attribute(module, "kind", "ours")
    patches.set_attribute(module, "kind", "ours again")
    patches.undo()
    assert module.__dict__["kind"] == "stock"


def test_an_undo_that_fails_keeps_no_other_change_and_can_be_tried_again() -> None:
    """It was forgotten, and the changes before it stayed until another ``undo``, which nobody called."""
    module, patches, failures = nn.Identity(), ModelPatches(), [OSError("the first"), OSError("the second")]

    def fail_at_first() -> None:
        if failures:
            raise failures.pop(0)
        module.__dict__.pop("by_hand")

    patches.begin("early")
    patches.set_attribute(module, "kind", "ours")
    patches.begin("late")
    module.__dict__["by_hand"] = True
    patches.on_undo(fail_at_first)
    patches.set_attribute(module, "note", "ours")
    for message in ("the first", "the second"):
        with pytest.raises(OSError, match=message):
            patches.undo()
        assert not module.__dict__.keys() & {"kind", "note"} and "by_hand" in module.__dict__
        assert patches.names == ["late"]
    patches.undo()
    assert patches.names == [] and "by_hand" not in module.__dict__


def test_a_trial_is_undone_when_it_fails() -> None:
    parent = nn.Sequential(nn.Identity())
    stock = parent[0]

    def fail() -> None:
        with ModelPatches() as trial:
            trial.replace_child(parent, "0", _Child())
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert parent[0] is stock


def test_a_function_with_other_globals_keeps_its_defaults_and_leaves_the_original_alone() -> None:
    rotate = modeling_llama.apply_rotary_pos_emb
    assert isinstance(rotate, FunctionType)
    ours = with_globals(rotate, rotate_half=lambda x: torch.zeros_like(x))
    q, cos = torch.ones(1, 1, 2, 4), torch.full((1, 2, 4), 0.5)
    assert torch.equal(ours(q, q, cos, cos)[0], q * 0.5)
    assert not torch.equal(rotate(q, q, cos, cos)[0], q * 0.5)
    assert modeling_llama.rotate_half.__module__ == modeling_llama.__name__

    attend = modeling_llama.LlamaAttention.forward
    assert isinstance(attend, FunctionType)
    assert with_globals(attend).__defaults__ == attend.__defaults__


def test_a_function_with_other_globals_keeps_defaults_of_keywords() -> None:
    assert isinstance(_keyword, FunctionType)
    assert with_globals(_keyword, IDS=None)(3) == 5


def _keyword(x: int, *, y: int = 2) -> int:
    return x + y
