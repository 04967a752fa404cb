"""Native kernels: linears in integers to the bit, and machines that have none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from cpu_kernels import kernels, native_kernel
from cpu_kernels.int8_weights import QMAX, Int8Rows, Outliers
from cpu_kernels.kernels import Kernels, choose_linear
from cpu_kernels.linear import ZERO, GatedCall, PackedLinear, choose_torch_linear, quantize_rows
from cpu_kernels.native_kernel import Launcher
from cpu_kernels.native_ops import NativeNorm, NativeOps
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


def test_without_an_openmp_library_kernels_in_c_run_on_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_kernel, "_SYMBOLS", ("no_such_function",))
    assert native_kernel.openmp.__wrapped__() is None
    monkeypatch.setattr(native_kernel, "openmp", lambda: None)
    assert not native_kernel.available.__wrapped__()
    chosen = kernels_without_numba(monkeypatch)
    gate, up = random(40, 1000), random(40, 1000, seed=1)
    assert torch.equal(chosen.silu_and_mul(gate, up), OPS.silu_and_mul(gate, up))


def test_without_numba_torchs_operations_stand_in_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not native_kernel.available.__wrapped__()
    assert isinstance(kernels_without_numba(monkeypatch).rms_norm(torch.ones(4), 1e-5), NativeNorm)


def test_without_the_library_of_kernels_torchs_operations_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert isinstance(Kernels(native=True, jit=False).rms_norm(torch.ones(4), 1e-5), TorchNorm)


def kernels_without_numba(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setattr(kernels, "available", native_kernel.available.__wrapped__)
    torchs = choose_torch_linear()
    assert torchs is not None and choose_linear() == torchs.name
    chosen = Kernels(linear=torchs.name, native=True).ready()
    assert chosen.add_deltas is not None and chosen.attention(torch.float32) is not None, "they are in C"
    return chosen
