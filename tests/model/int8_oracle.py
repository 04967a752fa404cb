"""A stock model that computes with the numbers of an int8 one, so that PEFT can be asked about it.

Its linears are stock classes whose weights are those the integers stand for. As long as nobody changed the weight they
compute with the int8 kernel, so that what is left between PEFT and the engine is what adapters do; with another weight
they compute in floats, as the engine does then.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.module_proxy import with_parameters
from server.quantization.int8_experts import BIASES, WEIGHTS, Int8Experts
from server.quantization.int8_modules import Int8Embedding, Int8Linear


class OracleLinear(nn.Linear):
    """A linear as PEFT knows it."""

    def __init__(self, ours: Int8Linear) -> None:
        super().__init__(ours.in_features, ours.out_features, bias=ours.bias is not None, device="meta")
        self.weight = nn.Parameter(ours.weight, requires_grad=False)
        self._parameters["bias"] = ours.bias
        self.untouched = self.weight.detach().clone()
        self.ours = _Shared(ours)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.equal(self.weight, self.untouched):
            return F.linear(x, self.weight, self.bias)
        return self.ours(x) - (0.0 if self.bias is None else self.ours.bias - self.bias)


class OracleConv1D(Conv1D):
    """GPT-2's linear."""

    def __init__(self, ours: Int8Linear) -> None:
        super().__init__(ours.nf, ours.nx)  # type: ignore[no-untyped-call]
        assert ours.bias is not None
        self.weight, self.bias = nn.Parameter(ours.weight, requires_grad=False), ours.bias
        self.untouched = self.weight.detach().clone()
        self.ours = _Shared(ours)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.equal(self.weight, self.untouched):
            return F.linear(x, self.weight.t(), self.bias)
        return self.ours(x) - (self.ours.bias - self.bias)


def oracle_experts(stock: nn.Module, ours: Int8Experts) -> None:
    """Give stock experts the numbers of our integers, and what computes with them while nobody changed these."""
    base: Any = type(stock)

    class OracleExperts(base):  # type: ignore[misc]
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            if not all(torch.equal(getattr(self, name), self.untouched[name]) for name in WEIGHTS):
                y: torch.Tensor = super().forward(*inputs)
            else:
                y = self.ours({name: getattr(self, name) for name in BIASES if name in self.untouched}, *inputs)
            return y

    for name, parameter in ours.dequantized().named_parameters():
        stock.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    numbers = {name: parameter.detach().clone() for name, parameter in stock.named_parameters()}
    stock.__class__ = OracleExperts
    stock.__dict__.update(untouched=numbers, ours=_SharedExperts(ours))


class _SharedExperts:
    """Int8 experts that copies of a model share."""

    def __init__(self, ours: Int8Experts) -> None:
        self._ours = ours

    def __call__(self, biases: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = with_parameters(self._ours, biases)(*inputs)
        return y

    def __deepcopy__(self, memo: dict[int, object]) -> _SharedExperts:
        return self


class _Shared:
    """An int8 linear that copies of a model share; it always computes anew."""

    def __init__(self, ours: Int8Linear) -> None:
        self._ours = ours
        self.bias = torch.zeros(()) if ours.bias is None else ours.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._ours(x.clone())
        return y

    def __deepcopy__(self, memo: dict[int, object]) -> _Shared:
        return self


def oracle_of(base: PreTrainedModel, int8: PreTrainedModel) -> PreTrainedModel:
    """A copy of the stock ``base`` with the numbers of its int8 form."""
    oracle = copy.deepcopy(base)
    embeddings, head = int8.get_input_embeddings(), base.get_output_embeddings()
    assert isinstance(embeddings, Int8Embedding) and head is not None
    for name, ours in int8.named_modules():
        if isinstance(ours, Int8Linear):
            made = OracleConv1D(ours) if isinstance(oracle.get_submodule(name), Conv1D) else OracleLinear(ours)
            parent, _, attribute = name.rpartition(".")
            setattr(oracle.get_submodule(parent), attribute, made)
        elif isinstance(ours, Int8Experts):
            oracle_experts(oracle.get_submodule(name), ours)
    looked_up = nn.Parameter(embeddings.weight, requires_grad=False)
    oracle.get_input_embeddings().weight = looked_up
    if head.weight is base.get_input_embeddings().weight:
        tied = oracle.get_output_embeddings()
        assert isinstance(tied, OracleLinear)
        torch.testing.assert_close(tied.weight, looked_up, rtol=1e-6, atol=0.0)
        tied.weight, tied.untouched = looked_up, looked_up.detach().clone()
    return oracle


def without_copies(folder: Path, target: Path, base: PreTrainedModel) -> Path:
    """An adapter's folder without the copies of the base's embeddings and head that PEFT saves beside it.

    PEFT would load them over the oracle's; the server knows them for what they are.
    """
    shutil.copytree(folder, target)
    path = target / "adapter_model.safetensors"
    both = (base.get_input_embeddings(), base.get_output_embeddings())
    theirs = [one.get_parameter("weight") for one in both if one is not None]
    tensors = load_file(path).items()
    save_file({name: one for name, one in tensors if not any(torch.equal(one, copied) for copied in theirs)}, path)
    return target
