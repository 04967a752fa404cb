"""Native kernels: linears in integers to the bit, operations between them, and machines that have none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import jit, njit
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cpu_kernels import kernels, native_kernel
from cpu_kernels.int8_weights import QMAX, Int8Rows, Outliers
from cpu_kernels.kernels import Kernels, choose_linear
from cpu_kernels.linear import ZERO, GatedCall, PackedLinear, choose_torch_linear, quantize_rows
from cpu_kernels.native_kernel import Launcher
from cpu_kernels.native_ops import NativeOps, exponential
from cpu_kernels.torch_ops import TorchNorm
from tests.instruction_sets import NUMBA, each_product, needs

pytestmark = needs(NUMBA)
ROWS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 100, 257, 300)
MOST_ROWS = max(ROWS)
DIMS = (1, 7, 16, 48, 896)
OPS = NativeOps(Launcher())


@pytest.fixture(params=each_product())
def make(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(linear=request.param)


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """What torch, and so every native kernel, runs on."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(num_rows: int, num_inputs: int) -> torch.Tensor:
    """Rows of very different sizes."""
    return random(num_rows, num_inputs) * torch.logspace(-3, 3, num_rows)[:, None]


def exact_product(rows: Int8Rows, x: torch.Tensor) -> torch.Tensor:
    """Activations on the grid as torch's kernels get them, their sums exact, scaled in float32.

    oneDNN's sums are the same, but not exact without VNNI, and by which of two numbers it scales first differs.
    """
    integers, largest = quantize_rows(x)
    sums = (integers.double() - ZERO) @ rows.integers.double().t()  # below 2 ** 53
    return sums.float() * (rows.scales * (1.0 / QMAX)) * largest


def assert_same(found: torch.Tensor, expected: torch.Tensor, about: object = None) -> None:
    """To the bit, but for what kind of NaN it is."""
    assert torch.equal(found.isnan(), expected.isnan()), about
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0)), about


@pytest.mark.parametrize("num_inputs", [16, 36, 64, 100, 896])
@pytest.mark.parametrize("num_outputs", [1, 33, 64, 65, 208, 1000])
def test_products_are_exact_sums_scaled_to_the_bit(
    make: Kernels, threads: int, num_outputs: int, num_inputs: int
) -> None:
    """Of however many rows, so that a row is the same alone and in any batch."""
    rows = Int8Rows.of([random(num_outputs, num_inputs, seed=1)])
    ours, x = make.linear(rows), activations(MOST_ROWS, num_inputs)
    expected = exact_product(rows, x)
    for num_rows in ROWS:
        for first in {0, MOST_ROWS - num_rows}:
            at = slice(first, first + num_rows)
            assert torch.equal(ours(x[at]), expected[at]), (num_rows, first)
    assert torch.equal(ours(x[None, :6].view(1, 2, 3, num_inputs)), expected[:6].view(1, 2, 3, num_outputs))
    turned = x[:5].t().contiguous().t()
    assert torch.equal(ours(turned), expected[:5]), "rows that do not lie in one piece"


def test_activations_at_borders_of_integers_fall_to_torchs_side(make: Kernels) -> None:
    """Scales were 127 / largest here and 127 * (1 / largest) in torch: now and then a number fell to the other side."""
    rows = Int8Rows.of([torch.eye(64)])
    largest = 0.1 + random(4000, 1).abs()
    x = -(63.5 + torch.arange(64)) / 127.0 * largest  # where a sum with 128.5 keeps the last bit
    x[:, 0] = largest[:, 0]
    assert torch.equal(make.linear(rows)(x), exact_product(rows, x))


@pytest.mark.parametrize("num_outputs", [33, 208])
def test_bias_and_outliers_are_added_in_floats(make: Kernels, threads: int, num_outputs: int) -> None:
    weight, bias, x = random(num_outputs, 100, seed=1), random(num_outputs, seed=2), activations(MOST_ROWS, 100)
    indices = torch.tensor([0, 63, 99])
    rows, outliers = Int8Rows.of([weight]), Outliers.of(indices, [weight])
    plain = make.linear(rows)
    with_bias, with_outliers, with_both = (
        make.linear(rows, bias),
        make.linear(rows, None, outliers),
        make.linear(rows, bias, outliers),
    )
    x[:, indices] *= 100.0
    assert torch.equal(with_bias(x), plain(x) + bias)
    others = plain(x * outliers.inlier_mask)
    for kernel, begin in ((with_outliers, others), (with_both, others + bias)):
        expected = begin
        for index in indices:
            expected = expected + x[:, index, None] * weight[:, index]
        for num_rows in ROWS:
            assert torch.equal(kernel(x[:num_rows]), expected[:num_rows]), num_rows
    exact = x.double() @ with_both.in_floats().double().t() + bias
    assert float((with_both(x) - exact).norm() / exact.norm()) < 0.001, "the largest channels are not rounded"


def gated_call(linear: PackedLinear) -> GatedCall:
    assert linear.gated is not None
    return linear.gated


@pytest.mark.parametrize("by_gelu", [False, True], ids=["silu", "gelu"])
@pytest.mark.parametrize("num_units", [16, 48, 304])
def test_gated_units_are_those_of_both_halves_to_the_bit(
    make: Kernels, threads: int, num_units: int, by_gelu: bool
) -> None:
    weight, bias, x = random(2 * num_units, 100, seed=1), random(2 * num_units, seed=2), activations(MOST_ROWS, 100)
    rows = Int8Rows.of([weight])
    for kernel in (make.linear(rows), make.linear(rows, bias, Outliers.of(torch.tensor([3, 70]), [weight]))):
        for num_rows in ROWS:
            gate, up = kernel(x[:num_rows]).split(num_units, -1)
            expected = (OPS.gelu_and_mul if by_gelu else OPS.silu_and_mul)(gate, up)
            assert_same(gated_call(kernel)(x[:num_rows], by_gelu=by_gelu), expected, num_rows)
    assert make.linear(Int8Rows.of([weight[:-1]])).gated is None


def test_rows_of_nan_and_infinity_keep_to_themselves(make: Kernels, threads: int) -> None:
    weight = random(70, 100, seed=1)
    rows = Int8Rows.of([weight])
    for kernel in (make.linear(rows), make.linear(rows, random(70), Outliers.of(torch.tensor([3, 70]), [weight]))):
        for num_rows in (2, 5, 17, 33, 300):
            x = activations(num_rows, 100)
            clean = kernel(x)
            for place, number in ((50, torch.nan), (50, torch.inf), (99, -torch.inf), (3, torch.nan), (3, torch.inf)):
                spoiled = x.clone()
                spoiled[1, place] = number
                y = kernel(spoiled)
                assert not y[1].isfinite().any()
                if number != number:
                    assert bool(y[1].isnan().all())
                others = torch.arange(num_rows) != 1
                assert torch.equal(y[others], clean[others]), (num_rows, place, number)


def test_the_weight_is_read_off_exactly(make: Kernels) -> None:
    for num_outputs, num_inputs in ((1, 16), (65, 36), (208, 100)):
        weight = random(num_outputs, num_inputs)
        rows, indices = Int8Rows.of([weight]), torch.tensor([0, num_inputs - 1])
        assert torch.equal(make.linear(rows).in_floats(), rows.in_floats())
        apart = make.linear(rows, None, Outliers.of(indices, [weight])).in_floats()
        assert torch.equal(apart[:, indices], weight[:, indices])
        assert torch.equal(apart[:, 1:-1], rows.in_floats()[:, 1:-1])


@pytest.mark.parametrize("dim", DIMS)
def test_rms_norms_are_the_formulas_and_a_row_is_the_same_in_any_batch(threads: int, dim: int) -> None:
    gain, x, eps = 1.0 + random(dim, seed=1), activations(600, dim), 1e-6
    norm, exact = OPS.rms_norm(gain, eps), x.double()
    exact = exact * (exact.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gain
    alone = torch.cat([norm(row[None]) for row in x])
    torch.testing.assert_close(alone, exact.float(), rtol=1e-6, atol=0.0)
    for num_rows in (2, 3, 7, 18, 19, 64, 257, 341, 600):
        for first in {0, 600 - num_rows}:
            at = slice(first, first + num_rows)
            assert torch.equal(norm(x[None, at])[0], alone[at]), (num_rows, first)
    heads = x.view(2, 300, dim).transpose(0, 1)
    assert torch.equal(norm(heads).transpose(0, 1).reshape(600, dim), alone)
    x[5, 0] = torch.nan
    spoiled = norm(x)
    assert bool(spoiled[5].isnan().all()) and torch.equal(spoiled[6:], alone[6:])


def exponential_of(x: torch.Tensor) -> torch.Tensor:
    y = np.empty(len(x), dtype=np.float32)
    _exponentials(x.numpy(), y)
    return torch.from_numpy(y)


@njit(error_model="numpy")
def _exponentials(x: Any, y: Any) -> None:
    for i in range(len(x)):
        y[i] = exponential(x[i])


def test_exponentials_are_exact_to_three_units_in_the_last_place() -> None:
    x = torch.linspace(-87.0, 88.0, 1_000_001)
    exact = x.double().exp()
    assert float(((exponential_of(x).double() - exact) / exact).abs().max()) < 3 * 2.0**-23
    near = torch.linspace(-1e-3, 1e-3, 10_001)
    assert float((exponential_of(near).double() - near.double().exp()).abs().max()) < 2.0**-23
    assert float(exponential_of(torch.zeros(1))) == 1.0


def test_exponentials_are_the_same_whoever_calls_first() -> None:
    """Numba compiled them with the liberties of their first caller: after attention's, gates were less exact."""
    again = jit(**exponential.targetoptions)(exponential.py_func)

    @njit(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
    def exponentials(x: Any, y: Any) -> None:
        for i in range(len(x)):
            y[i] = again(x[i])

    x, y = torch.linspace(-87.0, 88.0, 100_001), np.empty(100_001, dtype=np.float32)
    exponentials(x.numpy(), y)
    assert torch.equal(torch.from_numpy(y), exponential_of(x))


def test_exponentials_end_in_zero_and_infinity_and_keep_nan() -> None:
    """A gate of -1e38 came out as -0.6, as the largest power was 1.7e38."""
    y = exponential_of(torch.tensor([-88.0, -1e4, -3e38, -torch.inf, 89.0, 1e4, 3e38, torch.inf, torch.nan]))
    assert not y[:4].any() and bool(y[4:8].isposinf().all()) and bool(y[8].isnan())


@pytest.mark.parametrize("dim", [2, 16, 64, 80, 128])
@pytest.mark.parametrize("num_rows", [1, 2, 33, 130])
def test_rotations_are_the_stock_codes_to_the_bit(threads: int, num_rows: int, dim: int) -> None:
    """Of queries and keys that are parts of one product, or lie in one piece."""
    joint = random(1, num_rows, 6 * dim)
    q, k = (part.view(1, num_rows, -1, dim).transpose(1, 2) for part in joint.split([4 * dim, 2 * dim], -1))
    angles = random(1, num_rows, dim, seed=1)
    cos, sin = angles.cos(), angles.sin()
    expected: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
    for views in ((q, k), (q.contiguous(), k.contiguous()), (q, k.contiguous())):
        for found, stock in zip(OPS.rotary_embedding(*views, cos, sin), expected, strict=True):
            assert found.shape == stock.shape and torch.equal(found, stock)


@pytest.mark.parametrize("dim", DIMS)
def test_gated_units_are_the_stock_codes(threads: int, dim: int) -> None:
    """Gates and others are parts of one product, or lie in one piece."""
    joint = 5.0 * random(1, 300, 2 * dim)
    gate, up = joint.split(dim, -1)
    alone = torch.cat([OPS.silu_and_mul(gate[:, row : row + 1], up[:, row : row + 1]) for row in range(300)], 1)
    stock = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(alone.double(), stock, rtol=5e-6, atol=1e-12)
    for num_rows in (2, 3, 5, 18, 64, 300):
        assert torch.equal(OPS.silu_and_mul(gate[:, :num_rows], up[:, :num_rows]), alone[:, :num_rows])
    assert torch.equal(OPS.silu_and_mul(gate.contiguous(), up.contiguous()), alone)


@pytest.mark.parametrize("dim", DIMS)
def test_units_gated_by_gelu_are_the_stock_codes(threads: int, dim: int) -> None:
    gate, up = (5.0 * random(1, 300, 2 * dim)).split(dim, -1)
    alone = torch.cat([OPS.gelu_and_mul(gate[:, n : n + 1], up[:, n : n + 1]) for n in range(300)], 1)
    stock = F.gelu(gate.double(), approximate="tanh") * up.double()
    torch.testing.assert_close(alone.double(), stock, rtol=5e-6, atol=1e-9)
    assert torch.equal(OPS.gelu_and_mul(gate, up), alone)


def test_gates_at_the_ends_of_float32_are_open_or_shut() -> None:
    gates = torch.tensor([100.0, -100.0, 1e4, -1e4, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 0.0])
    for up in (1.0, -1e30, 0.0, torch.nan):
        gate, other = gates.repeat(3)[None, None], torch.full((1, 1, 30), up)
        found, stock = OPS.silu_and_mul(gate, other), F.silu(gate) * other
        torch.testing.assert_close(found, stock, rtol=1e-6, atol=1e-11, equal_nan=True)
        by_gelu = OPS.gelu_and_mul(gate, other)
        stock = (F.gelu(gate.double(), approximate="tanh") * other.double()).float()
        torch.testing.assert_close(by_gelu, stock, rtol=1e-6, atol=1e-11, equal_nan=True)


def test_a_row_of_nan_gates_keeps_to_itself() -> None:
    gate, up = random(1, 40, 48), random(1, 40, 48, seed=1)
    clean = OPS.silu_and_mul(gate, up)
    gate[0, 7] = torch.nan
    found = OPS.silu_and_mul(gate, up)
    assert bool(found[0, 7].isnan().all())
    others = torch.arange(40) != 7
    assert torch.equal(found[0, others], clean[0, others])


def test_without_an_openmp_library_torchs_operations_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_kernel, "_SYMBOLS", ("no_such_function",))
    assert native_kernel.openmp.__wrapped__() is None
    monkeypatch.setattr(native_kernel, "openmp", lambda: None)
    assert not native_kernel.available.__wrapped__()
    assert_torch_does_the_work(monkeypatch)


def test_without_numba_torchs_operations_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not native_kernel.available.__wrapped__()
    assert_torch_does_the_work(monkeypatch)


def assert_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", native_kernel.available.__wrapped__)
    torchs = choose_torch_linear()
    assert torchs is not None and choose_linear() == torchs.name
    chosen = Kernels(linear=torchs.name, native=True).ready()
    assert chosen.add_deltas is None and chosen.decode_attention(torch.float32) is None
    assert isinstance(chosen.rms_norm(torch.ones(4), 1e-5), TorchNorm)
