"""A GGUF file as a base: config, tensors and tokenizer as transformers has them, made in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from base_files.errors import BaseMalformed
from base_files.gguf.architectures import ARCHITECTURES, SHAPES, TOP_LEVEL
from base_files.gguf.config import ModelConfig, read_config
from base_files.gguf.file import GGUFFile, check_is_model, read_gguf
from base_files.gguf.fingerprint import gguf_fingerprint
from base_files.gguf.metadata import MetadataReader, listed
from base_files.gguf.tokenizer import GGUFTokenizer, read_tokenizer
from base_files.gguf.weights import (
    experts_interleaved,
    experts_joined,
    experts_transposed,
    minus_one,
    renamed,
    with_rotation_halves_apart,
)
from base_files.source import Fingerprints
from base_files.tensors import StoredTensor

_DTYPES = {"F32": "float32", "F16": "float16"}
_PART_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class GGUFBase:
    """A model in GGUF; ``path`` is its file, or one of its parts. Everything that is read may raise ``BaseMalformed``.

    ``given_name`` is that of the folder or package that holds the file, if the base was found by it. ``sampling`` are
    sampling parameters under transformers' names.
    """

    path: Path
    given_name: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Without the path, the suffix, and the number of a split file's part."""
        return self.given_name or _PART_NUMBER.sub("", self.path.stem)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """What transformers' ``config.json`` would say."""
        end_ids = self.tokenizer.end_ids
        ids = {
            "bos_token_id": self.tokenizer.bos_id,
            "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None,
            "pad_token_id": self.tokenizer.pad_id,
        }
        return self._model.config | ids | {"dtype": self._dtype}

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """What transformers' ``generation_config.json`` would say: which tokens begin and end answers, and sampling."""
        ids = {key: self.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {**ids, "do_sample": True, **self.sampling} if self.sampling else ids

    @cached_property
    def tokenizer(self) -> GGUFTokenizer:
        with self._malformed():
            return read_tokenizer(self._file.metadata, vocab_size=self._model.sizes.vocab)

    @cached_property
    def num_weight_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self._file.tensors.values())

    def fingerprints(self) -> Fingerprints:
        with self._malformed():
            return Fingerprints(None, gguf_fingerprint(self._file))

    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every parameter of the model, by its name in transformers; a tied head is the embedding and not among them.

        A tensor of the file that becomes no parameter, and a parameter that no tensor becomes, refuse the file.
        """
        with self._malformed():
            return _ParameterReader(self._model, self._file.tensors).read()

    def token_texts(self) -> Mapping[int, str]:
        return dict(enumerate(self.tokenizer.tokens))

    @cached_property
    def _file(self) -> GGUFFile:
        with self._malformed():
            return read_gguf(self.path)

    @cached_property
    def _model(self) -> ModelConfig:
        with self._malformed():
            name = _architecture(self._file)
            return read_config(name, MetadataReader(self._file.metadata, f"{name}."), self._file.tensors)

    @contextmanager
    def _malformed(self) -> Iterator[None]:
        """Turns a reader's sentence, or an error of the system, into ``BaseMalformed``."""
        try:
            yield
        except ValueError as error:
            raise BaseMalformed(self.name, str(error)) from None
        except OSError as error:
            raise BaseMalformed(self.name, error.strerror or str(error)) from error

    @property
    def _dtype(self) -> str:
        """What the matrices are in, and bfloat16 for quantized ones."""
        dtypes = {tensor.dtype for tensor in self._file.tensors.values() if len(tensor.shape) > 1}
        return _DTYPES.get(dtypes.pop(), "bfloat16") if len(dtypes) == 1 else "bfloat16"


def _architecture(file: GGUFFile) -> str:
    check_is_model(file.metadata)
    name = MetadataReader(file.metadata, "general.").text("architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture is {name!r:.40}; {', '.join(ARCHITECTURES)} are read from GGUF. Of another one use "
            "the model's folder of safetensors, or its hub id"
        )
    return name


class _ParameterReader:
    """Takes the file's tensors one by one under the names of transformers."""

    def __init__(self, model: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
        self._model, self._tensors = model, tensors
        self._left = dict.fromkeys(tensors)
        self._missing: list[str] = []
        self._wrong: list[str] = []

    def read(self) -> Mapping[str, StoredTensor]:
        for factors in self._model.architecture.factors:
            self._left.pop(factors, None)  # in the config
        parameters = {parameter.name: parameter for parameter in self._all()}
        if self._missing:
            raise ValueError(f"this file lacks tensors that its architecture has: {listed(self._missing)}")
        if self._wrong:
            raise ValueError(f"this file has tensors of another shape than its metadata asks for: {self._wrong[0]}")
        if self._left:
            raise ValueError(
                f"this file has tensors that are not understood: {listed([*self._left])}. Each may mean another "
                "computation: use the model's folder of safetensors instead"
            )
        return parameters

    def _all(self) -> Iterator[StoredTensor]:
        tied = self._model.config["tie_word_embeddings"]
        for name, module in TOP_LEVEL.items():
            if not (tied and name == "output"):
                yield from self._weight(name, f"{name}.weight", f"{module}.weight")
        for layer in range(self._model.sizes.layers):
            yield from self._block(f"blk.{layer}.", f"model.layers.{layer}.")

    def _block(self, prefix: str, layer: str) -> Iterator[StoredTensor]:
        has_experts = self._model.sizes.experts > 0
        for name, module in self._model.architecture.blocks.items():
            if has_experts and module.startswith("mlp."):
                continue
            yield from self._weight(name, f"{prefix}{name}.weight", f"{layer}{module}.weight")
            if name in self._model.biased:
                yield from self._weight(name, f"{prefix}{name}.bias", f"{layer}{module}.bias")
        if self._model.config["model_type"] == "gpt_oss":
            yield from self._gpt_oss_experts(prefix, layer)
        elif has_experts:
            yield from self._experts(prefix, f"{layer}mlp.")

    def _weight(self, name: str, stored: str, parameter: str) -> Iterator[StoredTensor]:
        tensor = self._take(name, stored)
        if tensor is None:
            return
        architecture = self._model.architecture
        if architecture.permuted and name in ("attn_q", "attn_k"):
            yield with_rotation_halves_apart(parameter, tensor, self._model.sizes.head)
        elif architecture.norm_shift and name.endswith("norm"):
            yield minus_one(parameter, tensor)
        else:
            yield renamed(parameter, tensor)

    def _experts(self, prefix: str, module: str) -> Iterator[StoredTensor]:
        router = self._take("ffn_gate_inp", f"{prefix}ffn_gate_inp.weight")
        gate, up, down = (self._take(f"ffn_{part}_exps", f"{prefix}ffn_{part}_exps.weight") for part in _EXPERT_PARTS)
        if router and gate and up and down:
            yield renamed(f"{module}gate.weight", router)
            yield experts_joined(f"{module}experts.gate_up_proj", gate, up)
            yield renamed(f"{module}experts.down_proj", down)

    def _gpt_oss_experts(self, prefix: str, layer: str) -> Iterator[StoredTensor]:
        sinks = self._take("attn_sinks", f"{prefix}attn_sinks.weight")
        if sinks:
            yield renamed(f"{layer}self_attn.sinks", sinks)
        experts = f"{layer}mlp.experts."
        for suffix, ending in (("weight", ""), ("bias", "_bias")):
            router = self._take("ffn_gate_inp", f"{prefix}ffn_gate_inp.{suffix}")
            gate, up, down = (
                self._take(f"ffn_{part}_exps", f"{prefix}ffn_{part}_exps.{suffix}") for part in _EXPERT_PARTS
            )
            if router and gate and up and down:
                yield renamed(f"{layer}mlp.router.{suffix}", router)
                yield experts_interleaved(f"{experts}gate_up_proj{ending}", gate, up)
                turned = experts_transposed if suffix == "weight" else renamed
                yield turned(f"{experts}down_proj{ending}", down)

    def _take(self, name: str, stored: str) -> StoredTensor | None:
        """The tensor in the file, checked against the config and counted as read."""
        tensor = self._tensors.get(stored)
        if tensor is None:
            self._missing.append(stored)
            return None
        self._left.pop(stored, None)
        sizes = tuple(int(getattr(self._model.sizes, size)) for size in SHAPES[name])
        shape = sizes[:-1] if stored.endswith(".bias") else sizes
        if tensor.shape != shape:
            self._wrong.append(f"{stored} {list(tensor.shape)} instead of {list(shape)}")
            return None
        return tensor


_EXPERT_PARTS = ("gate", "up", "down")
