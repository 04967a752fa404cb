"""Wrappers of the base's modules that apply another adapter to each row. The base's module is not changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from server.lora.backend import LoRABackend
from server.lora.delta import AddsParameterDeltas, LoRADelta
from server.module_proxy import ModuleProxy


class AdaptedModule(ModuleProxy):
    """Replaces ``base``, whose result is returned unchanged for rows without an adapter; ``deltas`` are by digest."""

    def __init__(self, base: nn.Module, backend: LoRABackend) -> None:
        super().__init__(base)
        self.base = base
        self.deltas: dict[str, LoRADelta] = {}
        self._backend, self._batch = backend, backend.batch
        self._compute = base.forward

    def put(self, digest: str, delta: LoRADelta) -> None:
        self.deltas[digest] = delta

    def drop(self, digest: str) -> None:
        self.deltas.pop(digest, None)

    def _parts(self, num_rows: int) -> list[tuple[slice, LoRADelta, float]]:
        """Rows, change and scale of each adapter that changes this module."""
        deltas = self.deltas
        return [
            (slice(run.start, run.end), deltas[use.digest], use.scale)
            for run in self._batch.runs(num_rows)
            for use in run.adapters
            if use.digest in deltas
        ]


class LoRALinear(AdaptedModule):
    """A linear: ``base(x) + x @ a @ b`` on the rows of a plain adapter, added by the backend."""

    def __init__(self, base: nn.Module, backend: LoRABackend, name: str) -> None:
        super().__init__(base, backend)
        self._name = name
        self._applied = False
        self._not_plain: set[str] = set()

    def attach(self) -> None:
        """Attach to the backend, which applies plain deltas unless the base's packed linear adds them."""
        self._applied = self._backend.attach(self._name)

    def put(self, digest: str, delta: LoRADelta) -> None:
        super().put(digest, delta)
        if not delta.plain:
            self._not_plain.add(digest)

    def drop(self, digest: str) -> None:
        super().drop(digest)
        self._not_plain.discard(digest)

    @property
    def changes(self) -> bool:
        """Whether it may change the base's result in the current step, or in a replay of it."""
        if self._applied:
            return self._backend.active
        return bool(self._not_plain) and self._batch.active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., rows, in] -> [..., rows, out]; dimensions before the rows are of size 1."""
        y: torch.Tensor = self._compute(x)
        if not self.changes:
            return y
        flat_y = y.view(-1, y.shape[-1])
        if self._applied:
            self._backend.apply(self._name, x, flat_y)
        if self._not_plain and self._batch.active:
            flat_x = x.reshape(-1, x.shape[-1])
            for rows, delta, scale in self._parts(len(flat_x)):
                if not delta.plain:
                    assert scale == 1.0
                    flat_y[rows] = _linear(flat_x[rows], flat_y[rows], delta)
        return y


class LoRAEmbedding(AdaptedModule):
    """An embedding: ``base(ids) + a[ids] @ b`` on the rows of a plain adapter."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, rows] -> [1, rows, dim]."""
        y: torch.Tensor = self._compute(ids)
        if not self._batch.active:
            return y
        flat_ids, flat_y = ids.reshape(-1), y.view(-1, y.shape[-1])
        for rows, delta, scale in self._parts(len(flat_ids)):
            if not delta.plain:
                assert scale == 1.0
                flat_y[rows] = _embedding(flat_ids[rows], flat_y[rows], delta)
            else:
                assert delta.a is not None and delta.b is not None
                flat_y[rows].add_(delta.a[flat_ids[rows]] @ delta.b, alpha=scale * delta.embed_scale)
        return y


class OwnParametersModule(AdaptedModule):
    """Any other module that computes each row by itself, with the parameters of the row's adapter."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """All inputs and results have the same row axis: [rows, ...], [1, rows, ...] or [1, heads, rows]."""
        if not self._batch.active:
            return self._compute(*inputs, **named)
        axis = next(iter(self.deltas.values())).axis
        num_rows = next(value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor)).shape[axis]
        parts = self._parts(num_rows)
        if len(parts) == 1 and parts[0][0] == slice(0, num_rows):
            return _call_with_own(parts[0][1], inputs, named)
        result = self._compute(*inputs, **named)
        for rows, delta, _ in parts:
            at = (slice(None),) * axis + (rows,)
            cut_inputs = tuple(_cut(value, axis, at, num_rows) for value in inputs)
            cut_named = {name: _cut(value, axis, at, num_rows) for name, value in named.items()}
            own = _call_with_own(delta, cut_inputs, cut_named)
            for target, source in zip(_as_tuple(result), _as_tuple(own), strict=True):
                target[at] = source
        return result


def as_base(module: nn.Module) -> nn.Module:
    """The base's module if no adapter changes its result in the current step, else ``module``."""
    if isinstance(module, LoRALinear) and not module.changes:
        return module.base
    return module


def _call_with_own(delta: LoRADelta, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The module's result with the adapter's parameters; sums with low-rank deltas exist only during the call.

    Deltas of quantized parameters are added by the module.
    """
    own = delta.own
    assert own is not None
    parameters = own._parameters
    before = {name: parameters[name] for name in delta.parameters if parameters.get(name) is not None}
    quantized = {name: change for name, change in delta.parameters.items() if name not in before}
    try:
        for name, whole in before.items():
            assert whole is not None
            parameters[name] = nn.Parameter(delta.parameters[name].added_to(whole), requires_grad=False)
        if quantized:
            assert isinstance(own, AddsParameterDeltas)
            return own.with_deltas(quantized, *inputs, **named)
        return own(*inputs, **named)
    finally:
        parameters.update(before)


def _cut(value: Any, axis: int, at: tuple[slice, ...], num_rows: int) -> Any:
    by_row = isinstance(value, torch.Tensor) and value.ndim > axis and value.shape[axis] == num_rows
    return value[at] if by_row else value


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _linear(x: torch.Tensor, y: torch.Tensor, delta: LoRADelta) -> torch.Tensor:
    """Rows of an adapter that is not plain: x [rows, in], the base's y [rows, out] -> [rows, out]."""
    z = _rescaled(y if delta.own is None else delta.own(x), delta)
    if delta.a is not None and delta.b is not None:
        z = torch.addmm(z, x.float() @ delta.a, delta.b)
    if delta.tokens is not None:
        z = z.index_copy(1, delta.tokens.indices, x.float() @ delta.tokens.rows.t())
    return z.to(y.dtype)


def _embedding(ids: torch.Tensor, y: torch.Tensor, delta: LoRADelta) -> torch.Tensor:
    """As ``_linear``: ids [rows], y [rows, dim]."""
    z = _rescaled(y if delta.own is None else delta.own(ids), delta)
    if delta.a is not None and delta.b is not None:
        z = torch.addmm(z, delta.a[ids], delta.b, alpha=delta.embed_scale)
    if delta.tokens is not None:
        index = torch.searchsorted(delta.tokens.indices, ids).clamp(max=len(delta.tokens.indices) - 1)
        is_replaced = delta.tokens.indices[index] == ids
        z = torch.where(is_replaced[:, None], delta.tokens.rows[index] * delta.embed_scale, z)
    return z.to(y.dtype)


def _rescaled(y: torch.Tensor, delta: LoRADelta) -> torch.Tensor:
    """``y * scale + shift`` in float32: DoRA's scale and the change of the bias."""
    z = y.float()
    if delta.scale is not None:
        z = z * delta.scale
    return z if delta.shift is None else z + delta.shift
