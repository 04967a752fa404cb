"""Operations between the linears in C, on every tier of this CPU: against torch's, alone and in any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cpu_kernels.native_kernel import Launcher
from cpu_kernels.native_ops import NativeOps
from cpu_kernels.tiers import available_tiers
from tests.guarded import guarded

TIERS = [tier for tier in available_tiers() if tier in ("generic", "avx2", "avx512vnni")]
WITH_FMA = [tier for tier in TIERS if tier != "generic"]
DIMS = (1, 7, 16, 48, 896)


class GuardedResults(TorchDispatchMode):
    """New tensors end at an unmapped page."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return guarded(result) if func is torch.ops.aten.empty.memory_format else result


@pytest.fixture(params=TIERS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(Launcher(request.param))


@pytest.fixture(params=[1, 2, 3], ids=["one_thread", "two_threads", "three_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """What torch, and so every native kernel, runs on."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return guarded(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def activations(num_rows: int, num_inputs: int) -> torch.Tensor:
    """Rows of very different sizes."""
    return guarded(random(num_rows, num_inputs) * torch.logspace(-3, 3, num_rows)[:, None])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit, but for what kind of NaN it is."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 50_001])
def test_sums_and_products_are_torchs_to_the_bit(ops: NativeOps, threads: int, size: int) -> None:
    x, other, y = random(size), random(size, seed=1), random(size, seed=2)
    ops.add(x, other, y)
    assert torch.equal(y, x + other)
    ops.scale(x, 0.22, y)
    assert torch.equal(y, x * 0.22)
    expected = x + other
    ops.add_(x, other)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dim", DIMS)
def test_rms_norms_are_the_formulas_and_a_row_is_the_same_in_any_batch(ops: NativeOps, threads: int, dim: int) -> None:
    gain, x, eps = guarded(1.0 + random(dim, seed=1)), activations(120, dim), 1e-6
    norm, exact = ops.rms_norm(gain, eps), x.double()
    exact = exact * (exact.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gain
    alone = torch.cat([norm(row[None]) for row in x])
    torch.testing.assert_close(alone, exact.float(), rtol=1e-6, atol=0.0)
    for num_rows in (2, 3, 7, 18, 19, 64, 120):
        for first in {0, 120 - num_rows}:
            at = slice(first, first + num_rows)
            assert torch.equal(norm(x[None, at])[0], alone[at]), (num_rows, first)
    heads = x.view(2, 60, dim).transpose(0, 1)
    assert torch.equal(norm(heads).transpose(0, 1).reshape(120, dim), alone)
    x[5, 0] = torch.nan
    spoiled = norm(x)
    assert bool(spoiled[5].isnan().all()) and torch.equal(spoiled[6:], alone[6:])


@pytest.mark.parametrize("dim", DIMS)
def test_the_norm_of_a_sum_is_that_of_the_sum_apart_to_the_bit(ops: NativeOps, threads: int, dim: int) -> None:
    norm, x, other = ops.rms_norm(random(dim, seed=1), 1e-6), activations(40, dim), random(40, dim, seed=2)
    expected = x + other
    normed = norm.of_sum(x, other)
    assert torch.equal(x, expected) and torch.equal(normed, norm(expected))


@pytest.mark.parametrize("dim", [2, 16, 64, 80, 128])
@pytest.mark.parametrize("num_rows", [1, 33, 130])
def test_rotary_embeddings_are_the_stock_codes_to_the_bit(
    ops: NativeOps, threads: int, num_rows: int, dim: int
) -> None:
    """Of queries and keys that are parts of one product, or contiguous."""
    joint = random(1, num_rows, 6 * dim)
    q, k = (part.view(1, num_rows, -1, dim).transpose(1, 2) for part in joint.split([4 * dim, 2 * dim], -1))
    angles = random(1, num_rows, dim, seed=1)
    cos, sin = guarded(angles.cos()), guarded(angles.sin())
    expected: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
    for queries, keys in ((q, k), (guarded(q), guarded(k)), (q, guarded(k))):
        for found, stock in zip(ops.rotary_embedding(queries, keys, cos, sin), expected, strict=True):
            assert found.shape == stock.shape and torch.equal(found, stock)


@pytest.mark.parametrize("dim", DIMS)
def test_gated_units_are_the_stock_codes(ops: NativeOps, threads: int, dim: int) -> None:
    """Gates and others are parts of one product, or contiguous."""
    joint = guarded(5.0 * random(1, 80, 2 * dim))
    gate, up = joint.split(dim, -1)
    alone = torch.cat([ops.silu_and_mul(gate[:, row : row + 1], up[:, row : row + 1]) for row in range(80)], 1)
    stock = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(alone.double(), stock, rtol=5e-6, atol=1e-12)
    for num_rows in (2, 3, 5, 18, 64, 80):
        assert torch.equal(ops.silu_and_mul(gate[:, :num_rows], up[:, :num_rows]), alone[:, :num_rows])
    assert torch.equal(ops.silu_and_mul(guarded(gate), guarded(up)), alone)


@pytest.mark.parametrize("dim", DIMS)
def test_units_gated_by_gelu_are_the_stock_codes(ops: NativeOps, threads: int, dim: int) -> None:
    gate, up = guarded(5.0 * random(1, 80, 2 * dim)).split(dim, -1)
    alone = torch.cat([ops.gelu_and_mul(gate[:, n : n + 1], up[:, n : n + 1]) for n in range(80)], 1)
    stock = F.gelu(gate.double(), approximate="tanh") * up.double()
    torch.testing.assert_close(alone.double(), stock, rtol=5e-6, atol=1e-9)
    assert torch.equal(ops.gelu_and_mul(gate, up), alone)


def test_gates_at_the_ends_of_float32_are_open_or_shut(ops: NativeOps) -> None:
    """A gate of -1e38 came out as -0.6, as the largest power was 1.7e38."""
    gates = torch.tensor([100.0, -100.0, 1e4, -1e4, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 0.0])
    for up in (1.0, -1e30, 0.0, torch.nan):
        gate, other = gates.repeat(3)[None, None], torch.full((1, 1, 30), up)
        found, stock = ops.silu_and_mul(gate, other), F.silu(gate) * other
        torch.testing.assert_close(found, stock, rtol=1e-6, atol=1e-11, equal_nan=True)
        by_gelu = ops.gelu_and_mul(gate, other)
        stock = (F.gelu(gate.double(), approximate="tanh") * other.double()).float()
        torch.testing.assert_close(by_gelu, stock, rtol=1e-6, atol=1e-11, equal_nan=True)


def test_a_row_of_nan_gates_keeps_to_itself(ops: NativeOps) -> None:
    gate, up = random(1, 40, 48), random(1, 40, 48, seed=1)
    clean = ops.silu_and_mul(gate, up)
    gate[0, 7] = torch.nan
    found = ops.silu_and_mul(gate, up)
    assert bool(found[0, 7].isnan().all())
    others = torch.arange(40) != 7
    assert torch.equal(found[0, others], clean[0, others])


@pytest.mark.parametrize("dim", [7, 100, 896])
def test_nothing_is_written_behind_results(ops: NativeOps, threads: int, dim: int) -> None:
    x, other = random(1, 40, dim), random(1, 40, dim, seed=1)
    q, k = (part.view(1, 40, 2, dim).transpose(1, 2) for part in random(1, 40, 4 * dim).split(2 * dim, -1))
    even = dim // 2 * 2
    with GuardedResults():
        norm = ops.rms_norm(random(dim), 1e-6)
        norm(x)
        norm.of_sum(x, other)
        ops.silu_and_mul(x, other)
        ops.gelu_and_mul(x, other)
        ops.rotary_embedding(q[..., :even], k[..., :even], x[..., :even], other[..., :even])


OPERATIONS: dict[str, Callable[[NativeOps, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "rms_norm": lambda ops, x, gain: ops.rms_norm(gain[0], 1e-6)(x),
    "silu_and_mul": lambda ops, x, up: ops.silu_and_mul(x, up),
    "gelu_and_mul": lambda ops, x, up: ops.gelu_and_mul(x, up),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_tiers_with_fma_agree_to_the_bit_and_the_generic_one_to_some_last_places(name: str) -> None:
    """A product and a sum are rounded once by FMA, and twice without it."""
    x, other = activations(64, 1003), random(64, 1003, seed=1)
    x[3, 5:8] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = {tier: OPERATIONS[name](NativeOps(Launcher(tier)), x, other) for tier in TIERS}
    for tier in WITH_FMA[1:]:
        assert_same(found[tier], found[WITH_FMA[0]])
    for tier in TIERS:
        torch.testing.assert_close(found[tier], found["generic"], rtol=1e-5, atol=1e-30, equal_nan=True)
