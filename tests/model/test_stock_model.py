"""A base that is no safetensors: filled block by block, read weight by weight for int8, refused if it is wrong."""

from __future__ import annotations

import itertools
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import server.model.loader
import trainer.base
from base_files.deferred_weights import DeferredWeights
from base_files.errors import BaseMalformed, BaseTooLarge, BaseUnloadable
from base_files.gguf.base import GGUFBase
from base_files.load_progress import LoadProgress
from base_files.safetensors_header import read_header
from base_files.source import BaseSource, Fingerprints, FolderBase
from base_files.stock_model import deferred_model, model_without_weights, stock_model
from base_files.tensors import SafetensorsTensor, StoredTensor
from base_files.weights_sample import sample_of
from server.model.loader import Base, load_base
from server.quantization.int8_modules import Int8Embedding, Int8Linear
from tests.gguf_models import model_arrays, model_metadata, tokenizer_metadata, write_gguf_model
from tests.model.families import FAMILIES, build
from tests.terminal import Terminal
from tests.tiny_models import build_tiny_base, tiny_tokenizer
from trainer.errors import BaseModelError


@dataclass(frozen=True)
class Stored:
    """A source whose tensors are those of a folder, with ``changes``; None takes a tensor away."""

    folder: FolderBase
    changes: Mapping[str, StoredTensor | None] = field(default_factory=dict)

    name = "stored"

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.folder.config

    @property
    def num_weight_bytes(self) -> int:
        return self.folder.num_weight_bytes

    def fingerprints(self) -> Fingerprints:
        return self.folder.fingerprints()

    def token_texts(self) -> Mapping[int, str] | None:
        return self.folder.token_texts()

    def tensors(self) -> Mapping[str, StoredTensor]:
        changed = {**self.folder.tensors(), **self.changes}
        return {name: tensor for name, tensor in changed.items() if tensor is not None}


def folder_of(family: str, path: Path) -> FolderBase:
    build(family).save_pretrained(path)
    return FolderBase(path)


def tensor_of(path: Path, tensor: torch.Tensor) -> SafetensorsTensor:
    save_file({"x": tensor}, path)
    return SafetensorsTensor(path, read_header(path)["x"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base as a folder, and as a GGUF file in float32."""
    folder = build_tiny_base(tmp_path_factory.mktemp("tiny") / "base")
    model = stock_model(FolderBase(folder))
    metadata = model_metadata(model, "llama") | tokenizer_metadata(tiny_tokenizer(), 512, "gpt-2")
    return folder, write_gguf_model(folder.parent / "base.gguf", "llama", model_arrays(model, "llama"), metadata)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_made_without_memory_has_its_buffers(family: str, tmp_path: Path) -> None:
    """Rotary frequencies and factors of embeddings are in no file: zeros would be served without an error."""
    source = folder_of(family, tmp_path)
    buffers = dict(stock_model(source).named_buffers())
    empty = model_without_weights(source, torch.float32)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert dict(empty.named_buffers()).keys() == buffers.keys()
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_model_filled_block_by_block_is_the_stock_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of Qwen 2 the head is the embedding."""
    folder = folder_of(family, tmp_path)
    expected, found = stock_model(folder, dtype), stock_model(Stored(folder), dtype)
    for (name, ours), (theirs, stock) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert name == theirs and ours.dtype == dtype and torch.equal(ours, stock), name
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert not found.training and found.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.norm.weight": None}, r"lack weights that the architecture has: model\.norm\.weight"),
        ({"model.rope_freqs.weight": 5}, r"that llama has no place for: model\.rope_freqs\.weight"),
        ({"model.norm.weight": 5}, r"model\.norm\.weight has the shape \[5\], its config asks for \[64\]"),
    ],
    ids=["missing", "unused", "of another shape"],
)
def test_files_that_are_not_of_the_config_are_refused_by_the_tensors_name(
    changes: dict[str, int | None], sentence: str, tmp_path: Path
) -> None:
    folder = folder_of("llama", tmp_path / "base")
    tensors = {
        name: None if size is None else tensor_of(tmp_path / "x.safetensors", torch.ones(size))
        for name, size in changes.items()
    }
    for load in (stock_model, deferred_model):
        with pytest.raises(BaseUnloadable, match=sentence):
            load(Stored(folder, tensors))


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that holds a tensor, as proc_pid_smaps(5) has them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the tensor lies in no mapping")


def deferred(source: BaseSource) -> tuple[PreTrainedModel, Any, torch.Tensor]:
    model, weights = deferred_model(source)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return model, weights, embedding.weight.data


def test_a_deferred_weight_is_in_memory_from_hold_to_release(tmp_path: Path) -> None:
    source = Stored(folder_of("llama", tmp_path))
    _, weights, embedding = deferred(source)
    stock = torch.from_numpy(source.tensors()["model.embed_tokens.weight"].read().copy())
    before = resident(embedding)
    weights.hold(embedding[7:9])
    assert torch.equal(embedding[7:9], stock[7:9]) and not embedding[20:].any(), "rows that nobody asked for are zeros"
    for rows, piece in zip(stock.split(len(stock)), weights.pieces(embedding), strict=True):
        assert torch.equal(piece, rows)
    weights.hold(embedding)
    assert torch.equal(embedding, stock)
    assert resident(embedding) >= before + embedding.nbytes - 3 * 4096
    weights.release(embedding)
    assert not embedding.any()
    weights.hold(embedding)
    assert torch.equal(embedding, stock), "it is read again from the file"


def test_a_kernel_without_huge_pages_holds_weights_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers the advice with an error, and no GGUF could be quantized."""
    source = Stored(folder_of("llama", tmp_path))
    monkeypatch.setattr(mmap, "MADV_NOHUGEPAGE", 9999)
    _, weights, embedding = deferred(source)
    weights.hold(embedding)
    assert np.array_equal(embedding, source.tensors()["model.embed_tokens.weight"].read())


def test_tensors_of_others_are_left_alone(tmp_path: Path) -> None:
    _, weights, embedding = deferred(Stored(folder_of("llama", tmp_path)))
    other = torch.ones(1000, 64)
    weights.hold(other)
    assert [len(piece) for piece in weights.pieces(other)] == [1000]
    weights.release(other)
    assert other.all() and not embedding.any()


def load_int8(base: Path) -> Base:
    return load_base(str(base), name="b", device="cpu", dtype="float32", max_model_len=None, quantization="int8")


def integers_of(base: Base) -> dict[str, torch.Tensor]:
    modules = base.model.named_modules(remove_duplicate=False)
    return {name: module.weight for name, module in modules if isinstance(module, Int8Linear | Int8Embedding)}


def test_a_gguf_gives_the_integers_of_its_folder(tiny: tuple[Path, Path]) -> None:
    """One is mapped, of the other each weight is read when the pass reaches it."""
    by_folder, by_gguf = load_int8(tiny[0]), load_int8(tiny[1])
    expected, found = integers_of(by_folder), integers_of(by_gguf)
    assert len(expected) > 10 and found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    for (name, ours), (_, theirs) in zip(
        by_gguf.model.named_parameters(), by_folder.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    by_folder.close()
    by_gguf.close()


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_base_that_does_not_fit_is_refused_before_it_is_read(
    kind: str, quantization: str, tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny[kind == "gguf"]
    numbers = sum(parameter.numel() for parameter in stock_model(FolderBase(tiny[0])).parameters())

    def load(available: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(server.model.loader, "available_bytes", lambda: available)
            load_base(
                str(path), name="b", device="cpu", dtype="float32", max_model_len=None, quantization=quantization
            ).close()

    with pytest.raises(BaseTooLarge, match="Choose a smaller base") as refused:
        load(1000)
    needed = refused.value.needed
    assert refused.value.available == 1000 and ("quantization" in str(refused.value)) == (quantization == "none")
    assert needed == 4 * numbers if quantization == "none" else numbers < needed < 2 * numbers
    load(needed)


def test_what_int8_needs_is_what_it_takes(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_int8(tiny[1])
    assert base.quantized is not None
    taken = base.quantized.num_bytes + sum(base.quantized.unquantized.values())
    base.close()
    monkeypatch.setattr(server.model.loader, "available_bytes", lambda: 1000)
    with pytest.raises(BaseTooLarge) as refused:
        load_int8(tiny[1])
    assert taken <= refused.value.needed < 1.2 * taken, "scales come on top: 4 bytes for 32 weights or more"


def test_the_trainer_refuses_a_base_that_does_not_fit(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.base, "available_bytes", lambda: 1000)
    with pytest.raises(BaseModelError, match=r"1,000 bytes are free\. It is trained on in float32"):
        trainer.base.load_base(str(tiny[1]))


def test_the_trainer_gets_the_same_weights_from_a_gguf(tiny: tuple[Path, Path]) -> None:
    models = [trainer.base.load_base(str(path)).model for path in tiny]
    for (name, ours), (_, theirs) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.fixture
def gguf(tiny: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    path = tmp_path / "base.gguf"
    path.write_bytes(tiny[1].read_bytes())
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CUT_OFF = r"base model 'base' cannot be read: base\.gguf became shorter"


def test_a_file_that_ends_early_while_it_is_read_is_a_sentence(gguf: Path) -> None:
    source = GGUFBase(gguf)
    assert source.tensors()
    cut(gguf)
    with pytest.raises(BaseMalformed, match=CUT_OFF):
        stock_model(source)


def test_a_file_that_ends_early_while_int8_is_made_is_a_sentence(gguf: Path) -> None:
    """A weight is then read long after the model was made: its error was a traceback."""
    model, weights = deferred_model(GGUFBase(gguf))
    last = [layer.mlp.down_proj.weight for layer in model.get_decoder().layers][-1]
    cut(gguf)
    with pytest.raises(BaseMalformed, match=CUT_OFF):
        weights.hold(last)


def test_a_file_that_ends_early_while_it_is_sampled_is_a_sentence(gguf: Path) -> None:
    """The trainer let its error through as a traceback."""
    source = GGUFBase(gguf)
    assert source.tensors() and source.token_texts()
    gguf.write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(BaseMalformed, match=CUT_OFF):
        sample_of(source)


def test_progress_of_a_pass_ends_its_line(tmp_path: Path) -> None:
    """On a terminal, what was logged after int8 was made stood behind the percentage."""
    stream = Terminal()
    tensor = tensor_of(tmp_path / "x.safetensors", torch.ones(4, 8))
    weights = DeferredWeights("b", LoadProgress("reading b", 32, stream=stream, clock=itertools.count(0, 5).__next__))
    weight = weights.place(tensor)
    with weights.one_pass("quantizing weights"):
        weights.hold(weight)
    assert stream.getvalue() == "\rquantizing weights: 100 %\n"
