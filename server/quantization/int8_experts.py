"""Mixtures of experts with int8 weights: every expert has two packed linears, which compute the rows routed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from cpu_kernels.int8_weights import Int8Rows, Outliers
from cpu_kernels.kernels import Kernels
from cpu_kernels.linear import PackedLinear
from server.module_proxy import ModuleProxy, with_parameters
from server.quantization.int8_modules import without_weights

WEIGHTS = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")
_TRIAL_SCALES = (1.0, 1.0, 30.0, 30.0, 1000.0, 1000.0)
_TOLERANCE = 1e-5


class LowRankOfExperts(Protocol):
    """``left @ right`` [experts, x, y] is added to a weight of the experts; ``left`` includes the scaling."""

    @property
    def left(self) -> torch.Tensor: ...

    @property
    def right(self) -> torch.Tensor: ...


Deltas = Mapping[str, LowRankOfExperts]
"""By the name of the weight."""


def follow_convention(module: nn.Module) -> bool:
    """Whether these are experts as transformers' ``use_experts_implementation`` describes them.

    The attributes that it sets are all that transformers' own implementations read, so that they say what is computed:
    ``down_proj[e](_apply_gate(gate_up_proj[e](x)))``, with biases or without.
    """
    has_bias = getattr(module, "has_bias", None)
    parameters = dict(module.named_parameters())
    if not isinstance(has_bias, bool) or parameters.keys() != {*WEIGHTS, *(BIASES if has_bias else ())}:
        return False
    return (
        getattr(module, "has_gate", None) is True
        and getattr(module, "has_post_expert_norm", None) is False
        and getattr(module, "_is_expert_parallel", None) is False
        and isinstance(getattr(module, "is_transposed", None), bool)
        and callable(getattr(module, "_apply_gate", None))
        and all(parameters[name].ndim == 3 for name in WEIGHTS)
    )


def num_experts(experts: nn.Module) -> int:
    return len(experts.get_parameter(WEIGHTS[0]))


def gate_of(experts: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Activation and product of gate and up: [rows, 2 * units] -> [rows, units]."""
    stock: Any = experts
    gate: Callable[[torch.Tensor], torch.Tensor] = stock._apply_gate
    return gate


ReadExpert = Callable[[str, int], torch.Tensor]
"""``f(name, expert)``: one expert's weight [out, in], whatever the layout of the parameter."""


def out_in(experts: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """One expert's weight between [out, in] and the layout of its parameter; a view."""
    return weight.t() if experts.is_transposed else weight


def sum_of_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    compute: Callable[[int, torch.Tensor], torch.Tensor],
    count: int,
) -> torch.Tensor:
    """Each row's experts, times their weights, added up in the order in which the router names them.

    hidden_states [rows, dim], top_k_index and top_k_weights [rows, k] -> [rows, dim]. ``compute(expert, x)`` returns
    the expert's outputs for the rows x. An index of ``count`` or more names no expert and adds nothing.
    """
    num_rows, chosen = top_k_index.shape
    x = hidden_states.float()
    dim = hidden_states.shape[-1]
    y = torch.zeros(num_rows * chosen, dim)
    if num_rows == 1:
        for place, expert in enumerate(top_k_index[0].tolist()):
            if expert < count:
                y[place] = compute(expert, x)[0]
    else:
        for expert, places in _places(top_k_index, count):
            y[places] = compute(expert, x[places // chosen])
    weighted = y.view(num_rows, chosen, dim).mul_(top_k_weights[:, :, None])
    return weighted.sum(1).to(hidden_states.dtype)


def _places(top_k_index: torch.Tensor, count: int) -> list[tuple[int, torch.Tensor]]:
    """Every expert that rows are routed to, with their places in the flattened indices."""
    experts = top_k_index.reshape(-1)
    order = experts.argsort(stable=True)
    num_rows = experts.clamp(max=count).bincount(minlength=count + 1).tolist()
    parts = order.split(num_rows)
    return [(expert, parts[expert]) for expert in range(count) if num_rows[expert]]


@dataclass(frozen=True)
class FloatExperts:
    """Stock experts, computed one after another, each read with ``read(name, expert)`` when rows are routed to it."""

    stock: nn.Module
    read: ReadExpert

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the stock module, but with no more than one expert's weights in floats."""
        return sum_of_experts(hidden_states, top_k_index, top_k_weights, self._compute, num_experts(self.stock))

    def _compute(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate_up = _with_bias(self._linear(WEIGHTS[0], expert, x), self.stock, BIASES[0], expert)
        gated = gate_of(self.stock)(gate_up)
        return _with_bias(self._linear(WEIGHTS[1], expert, gated), self.stock, BIASES[1], expert)

    def _linear(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.read(name, expert).float())


class Int8Experts(ModuleProxy):
    """Quantized experts. Their biases are parameters, in floats.

    ``gate_up`` and ``down`` have one linear for each expert, without bias.
    """

    def __init__(self, stock: nn.Module, gate_up: Sequence[PackedLinear], down: Sequence[PackedLinear]) -> None:
        stock = without_weights(stock, WEIGHTS)
        super().__init__(stock)
        for name in BIASES:
            if name in stock._parameters:
                self._parameters[name] = stock._parameters[name]
        self._linears = {WEIGHTS[0]: gate_up, WEIGHTS[1]: down}
        self._apply_gate = gate_of(stock)
        self._gelu = _gating_of(stock) if gate_up[0].gated is not None else None

    @classmethod
    def of(cls, stock: nn.Module, read: ReadExpert, kernels: Kernels, outliers: torch.Tensor | None) -> Int8Experts:
        """Quantize experts, of which one is in floats at a time; ``outliers`` are the outlier channels of their input.

        Inputs of ``down_proj`` have none: every expert has channels of its own, for which calibration sees few rows.
        """
        packed: dict[str, list[PackedLinear]] = {name: [] for name in WEIGHTS}
        for name, indices in zip(WEIGHTS, (outliers, None), strict=True):
            for expert in range(num_experts(stock)):
                weight = read(name, expert)
                rows = Int8Rows.of([weight], qmax=kernels.qmax)
                kept = None if indices is None else Outliers.of(indices, [weight])
                packed[name].append(kernels.linear(rows, None, kept))
        return cls(stock, *packed.values())

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [rows, dim], top_k_index and top_k_weights [rows, k] -> [rows, dim]."""
        return self.with_deltas({}, hidden_states, top_k_index, top_k_weights)

    def with_deltas(
        self, deltas: Deltas, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As ``forward``, with low-rank deltas of the weights, computed in float32 beside the int8 product."""

        def compute(expert: int, x: torch.Tensor) -> torch.Tensor:
            return self._linear(WEIGHTS[1], expert, self._gated(expert, x, deltas), deltas)

        return sum_of_experts(hidden_states, top_k_index, top_k_weights, compute, len(self._linears[WEIGHTS[0]]))

    def dequantized(self) -> nn.Module:
        """The stock module with the weights that the integers stand for, float32."""
        stock = self._stock[0]
        weights = {
            name: torch.stack([out_in(stock, linear.in_floats()) for linear in linears])
            for name, linears in self._linears.items()
        }
        return with_parameters(stock, weights)

    def _gated(self, expert: int, x: torch.Tensor, deltas: Deltas) -> torch.Tensor:
        gated = self._linears[WEIGHTS[0]][expert].gated
        if self._gelu is not None and gated is not None and WEIGHTS[0] not in deltas:
            return gated(x, by_gelu=self._gelu)
        return self._apply_gate(self._linear(WEIGHTS[0], expert, x, deltas))

    def _linear(self, name: str, expert: int, x: torch.Tensor, deltas: Deltas) -> torch.Tensor:
        y = _with_bias(self._linears[name][expert](x), self, f"{name}_bias", expert)
        if name not in deltas:
            return y
        left, right = deltas[name].left[expert], deltas[name].right[expert]
        if self._stock[0].is_transposed:
            return y.addmm_(x @ left, right)
        return y.addmm_(x @ right.t(), left.t())


def _with_bias(y: torch.Tensor, experts: nn.Module, name: str, expert: int) -> torch.Tensor:
    bias = experts._parameters.get(name)
    return y if bias is None else y.add_(bias[expert])


def _gating_of(experts: nn.Module) -> bool | None:
    """False if units are gated by ``silu(gate) * up`` of two halves, True if by GELU's tanh form, None otherwise."""
    if any(name in experts._parameters for name in BIASES):
        return None
    x = torch.randn(len(_TRIAL_SCALES), 64, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor(_TRIAL_SCALES)[:, None]
    expected = gate_of(experts)(x)
    gate, up = x.chunk(2, -1)
    forms = ((False, F.silu(gate) * up), (True, F.gelu(gate, approximate="tanh") * up))
    for by_gelu, found in forms:
        if found.shape == expected.shape:
            limit = _TOLERANCE * expected.abs().amax(-1, keepdim=True)
            if bool(((found - expected).abs() <= limit).all()):
                return by_gelu
    return None
