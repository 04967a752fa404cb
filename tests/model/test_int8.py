"""Products with int8 weights: near the float ones, and a row's result never depends on the rows beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import abc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cpu_kernels import kernels, linear
from cpu_kernels.int8_weights import QMAX_16BIT_SAFE, Int8Rows
from cpu_kernels.kernels import Kernels, choose_linear
from cpu_kernels.linear import NO_DELTAS, FbgemmLinear, OnednnLinear, PackedLinear, choose_torch_linear
from server.quantization.int8_modules import FusedLinear, Int8Embedding, Int8Linear, WeightDigest, join_biases
from server.sequence import Batch, Segment, Sequence
from tests.instruction_sets import variables_of
from tests.model.families import build
from tests.model.harness import GREEDY, host
from tests.model.int8_bases import (
    LINEARS,
    assert_micro_understands,
    rounding_of_both,
    rows_for,
)
from tests.serving import ROOT

NUM_INPUTS, NUM_OUTPUTS = 144, 208
BATCHES = (1, 2, 8, 32)


@pytest.fixture(params=LINEARS)
def make(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(linear=request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(make: Kernels, *, num_outputs: int = NUM_OUTPUTS) -> PackedLinear:
    return make.linear(rows_for(make, [random(num_outputs, NUM_INPUTS, seed=1)]))


def assert_independent(compute: Callable[[torch.Tensor], torch.Tensor], num_inputs: int = NUM_INPUTS) -> None:
    """Each of many rows is the same to the bit alone, in batches, and at another place."""
    x = random(max(BATCHES), num_inputs) * torch.logspace(-3, 3, max(BATCHES))[:, None]
    alone = torch.cat([compute(row[None]) for row in x])
    for size in BATCHES:
        for start in (0, 1, 7):
            rows = slice(start, start + size)
            assert torch.equal(compute(x[rows]), alone[rows]), (size, start)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.equal(compute(x[order]), alone[order])


def test_a_row_is_the_same_alone_and_in_batches(make: Kernels) -> None:
    assert_independent(linear_of(make))
    assert_independent(linear_of(make, num_outputs=33))


def test_products_are_near_those_in_floats(make: Kernels) -> None:
    """Activations are rounded to a 254th of their largest number, weights to as many steps as the kernel has."""
    kernel, x = linear_of(make), random(32, NUM_INPUTS)
    true = x @ random(NUM_OUTPUTS, NUM_INPUTS, seed=1).t()
    error = float((kernel(x) - true).norm() / true.norm())
    assert error < rounding_of_both(make, 0.012)  # measured: 0.0087, and 0.0137 with 64 levels
    rounded = x @ kernel.in_floats().t()
    assert float((kernel(x) - rounded).norm() / true.norm()) < 0.009  # measured: 0.0061


def test_activations_on_the_grid_are_multiplied_exactly(make: Kernels) -> None:
    """Whatever is not rounded comes out as float32 has it, so that all that is lost is the rounding."""
    kernel = linear_of(make)
    x = torch.randint(-127, 128, (8, NUM_INPUTS), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127.0
    true = x.double() @ kernel.in_floats().double().t()
    torch.testing.assert_close(kernel(x).double(), true, rtol=1e-5, atol=1e-3)


def test_a_row_of_zeros_is_zero_and_one_of_infinities_or_nan_keeps_to_itself(make: Kernels) -> None:
    kernel, x = linear_of(make), random(8, NUM_INPUTS)
    clean = kernel(x)
    x[1], x[3, 5], x[5, 7], x[6, 2] = 0.0, torch.nan, torch.inf, -torch.inf
    y = kernel(x)
    assert not y[1].any()
    for row in (3, 5, 6):
        assert not y[row].isfinite().any()
    for row in (0, 2, 4, 7):
        assert torch.equal(y[row], clean[row])


def test_numbers_near_the_ends_of_float32_neither_overflow_nor_vanish(make: Kernels) -> None:
    kernel, x = linear_of(make), random(2, NUM_INPUTS)
    y = kernel(x)
    for factor in (2.0**60, 2.0**-60):
        torch.testing.assert_close(kernel(x * factor), y * factor, rtol=1e-5, atol=0.0)
    assert not kernel(torch.full((1, NUM_INPUTS), 1e-38)).isnan().any()


def test_the_weights_that_integers_stand_for_are_read_off_exactly(make: Kernels) -> None:
    rows = rows_for(make, [random(5, NUM_INPUTS), random(3, NUM_INPUTS, seed=1)])
    kernel = make.linear(rows)
    torch.testing.assert_close(kernel.in_floats(), rows.in_floats(), rtol=1e-6, atol=0.0)


def test_rows_are_rounded_to_the_nearest_of_254_steps() -> None:
    weight = random(40, 64)
    weight[3] = 0.0
    rows = Int8Rows.of([weight[:10], weight[10:]])
    assert int(rows.integers.abs().max()) == 127 and not rows.in_floats()[3].any()
    assert bool(((rows.in_floats() - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253).all())
    again = Int8Rows.of([rows.in_floats()])
    assert torch.equal(again.integers, rows.integers)


def product_of(
    make: Kernels, sizes: abc.Sequence[int], *, biases: bool = True
) -> tuple[FusedLinear, list[torch.Tensor], list[torch.Tensor | None]]:
    """A product with the float weights and biases it was made of; the second linear has no bias."""
    weights = [random(size, NUM_INPUTS, seed=number) for number, size in enumerate(sizes)]
    added = [random(size, seed=9) if biases and number != 1 else None for number, size in enumerate(sizes)]
    return FusedLinear(make.linear(rows_for(make, weights), join_biases(sizes, added)), sizes), weights, added


def test_parts_of_a_packed_product_are_the_linears_one_by_one(make: Kernels) -> None:
    sizes = (64, 32, 48)
    product, weights, biases = product_of(make, sizes)
    x = random(1, 5, NUM_INPUTS)
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        alone = FusedLinear(make.linear(rows_for(make, [weight]), bias), (len(weight),))
        assert torch.equal(product.part(number, x), alone.part(0, x))
        torch.testing.assert_close(product.dequantized(number), alone.dequantized(0), rtol=1e-6, atol=0.0)
    assert_independent(lambda rows: torch.cat([product.part(number, rows) for number in range(3)], dim=-1))


class CountingLinear:
    """A linear in floats, whose calls are counted."""

    gated = None

    def __init__(self, rows: Int8Rows) -> None:
        self.num_outputs, self.num_inputs = rows.integers.shape
        self.weight, self.num_calls = rows.in_floats(), 0

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS) -> torch.Tensor:
        assert deltas == NO_DELTAS
        self.num_calls += 1
        return x @ self.weight.t()

    def can_add_deltas(self, sizes: abc.Sequence[int]) -> bool:
        return False

    def in_floats(self) -> torch.Tensor:
        return self.weight


def test_linears_keep_nothing_of_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that nobody asked for stayed in memory until the next step, with the input they were made of."""
    hosted = host(build("llama"), linear=choose_linear())
    fused = {module.fused for module in hosted.model.modules() if isinstance(module, Int8Linear)}
    part = FusedLinear.part
    kept: list[bool] = []

    def first_part_alone(linear: FusedLinear, number: int, x: torch.Tensor) -> torch.Tensor:
        if number > 0:
            kept.append(any(other._x is not None for other in fused))
            raise MemoryError("no room")
        return part(linear, number, x)

    for module in hosted.model.modules():
        if isinstance(module, Int8Linear):
            monkeypatch.setattr(module, "forward", partial(first_part_alone, module.fused, module.number))
    sequence = Sequence(0, (5, 6, 7), 4, GREEDY)
    with pytest.raises(MemoryError, match="no room"):
        hosted.runner.run(Batch((Segment(sequence, 0, 0, 3),)))
    assert kept == [True] and all(linear._x is None and linear._y == [] for linear in fused)


def counting() -> tuple[CountingLinear, FusedLinear]:
    kernel = CountingLinear(Int8Rows.of([random(96, NUM_INPUTS)]))
    return kernel, FusedLinear(kernel, (64, 32))


def test_the_first_part_computes_all_and_nothing_is_kept_after_the_last() -> None:
    kernel, product = counting()
    x = random(4, NUM_INPUTS)
    for order in ((0, 1), (1, 0)):
        kernel.num_calls = 0
        for number in order:
            product.part(number, x)
        assert kernel.num_calls == 1
        assert product._x is None and not product._y


def test_a_part_belongs_to_the_very_tensor_it_was_computed_for() -> None:
    kernel, product = counting()
    x, other = random(4, NUM_INPUTS), random(4, NUM_INPUTS, seed=1)
    product.part(0, x)
    second = product.part(1, other)
    assert torch.equal(second, other @ kernel.weight[64:].t())
    assert torch.equal(product.part(0, x.clone()), x @ kernel.weight[:64].t())


def test_a_part_asked_for_twice_is_computed_anew_though_the_first_was_written_into() -> None:
    """Adapters add to a result in place; the same linear may be called again with the same tensor."""
    kernel, product = counting()
    x = random(4, NUM_INPUTS)
    true = x @ kernel.weight.t()
    product.part(0, x).add_(1.0)
    assert torch.equal(product.part(0, x), true[:, :64])
    assert torch.equal(product.part(1, x), true[:, 64:])


def test_a_part_is_the_callers_to_write_into() -> None:
    kernel, product = counting()
    x = random(1, 4, NUM_INPUTS)
    product.part(0, x).view(-1, 64).fill_(0.0)
    assert torch.equal(product.part(1, x), x @ kernel.weight[64:].t())


def test_bfloat16_comes_out_as_it_went_in(make: Kernels) -> None:
    product, weights, _ = product_of(make, (64, 32), biases=False)
    x = random(1, 6, NUM_INPUTS).bfloat16()
    y = product.part(0, x)
    assert y.dtype == torch.bfloat16 and y.shape == (1, 6, 64)
    true = x.float() @ weights[0].t()
    assert float((y.float() - true).norm() / true.norm()) < rounding_of_both(make, 0.025)


def int8_linear(stock: nn.Module, make: Kernels) -> Int8Linear:
    weight = stock.get_parameter("weight").detach()
    turned = weight.t() if isinstance(stock, Conv1D) else weight
    bias = join_biases((len(turned),), (stock._parameters.get("bias"),))
    product = FusedLinear(make.linear(rows_for(make, [turned]), bias), (len(turned),))
    return Int8Linear(stock, WeightDigest.of(weight), product, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_says_what_the_stock_module_said(make: Kernels, bias: bool) -> None:
    stock = nn.Linear(NUM_INPUTS, NUM_OUTPUTS, bias=bias).requires_grad_(False)
    ours, x = int8_linear(stock, make), random(3, NUM_INPUTS)
    assert float((ours(x) - stock(x)).norm() / stock(x).norm()) < rounding_of_both(make, 0.025)
    assert (ours.in_features, ours.out_features) == (NUM_INPUTS, NUM_OUTPUTS)
    assert ours.weight.shape == stock.weight.shape and ours.weight.dtype == torch.float32
    assert [name for name, _ in ours.named_parameters()] == (["bias"] if bias else [])
    floats = ours.dequantized()
    assert type(floats) is nn.Linear and floats.in_features == NUM_INPUTS
    assert torch.equal(floats.get_parameter("weight"), ours.weight)
    assert (floats._parameters["bias"] is None) != bias
    with pytest.raises(AttributeError):
        _ = ours.nothing


def test_a_conv1d_keeps_its_layout(make: Kernels) -> None:
    """GPT-2 has its weights the other way round, [in, out]."""
    stock = Conv1D(NUM_OUTPUTS, NUM_INPUTS).requires_grad_(False)
    stock.bias.copy_(random(NUM_OUTPUTS))
    ours, x = int8_linear(stock, make), random(1, 3, NUM_INPUTS)
    assert float((ours(x) - stock(x)).norm() / stock(x).norm()) < rounding_of_both(make, 0.02)
    assert ours.weight.shape == (NUM_INPUTS, NUM_OUTPUTS) and ours.nf == NUM_OUTPUTS
    half_a_step = float(stock.weight.abs().max()) / (2 * make.qmax - 1)
    assert float((ours.weight - stock.weight).abs().max()) <= half_a_step
    torch.testing.assert_close(ours.dequantized()(x), x @ ours.weight + stock.bias)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def __init__(self, num_embeddings: int, dim: int, scale: float) -> None:
        super().__init__(num_embeddings, dim)
        self.register_buffer("embed_scale", torch.tensor(scale))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scale = self.embed_scale
        assert isinstance(scale, torch.Tensor)
        return super().forward(ids) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_looks_up_rows_with_the_models_scale(dtype: torch.dtype) -> None:
    stock = ScaledEmbedding(50, 64, 8.0).requires_grad_(False)
    rows = Int8Rows.of([stock.weight])
    ours, ids = Int8Embedding(stock, WeightDigest.of(stock.weight), rows, dtype), torch.tensor([[3, 49], [0, 3]])
    y = ours(ids)
    assert y.dtype == dtype and y.shape == (2, 2, 64)
    assert float((y.float() - stock(ids)).norm() / stock(ids).norm()) < 0.012
    assert torch.equal(ours.weight, rows.in_floats())
    torch.testing.assert_close(ours.dequantized()(ids), y.float(), rtol=1e-2, atol=1e-6)
    assert list(ours.parameters()) == []


def test_an_original_is_known_again_in_any_format() -> None:
    """Adapters are saved in float32 beside a base in bfloat16, or the other way round."""
    weight = random(300, 64).bfloat16()
    original = WeightDigest.of(weight)
    assert original.equals(weight) and original.equals(weight.float())
    changed = weight.clone()
    changed[299, 63] += 1
    assert not original.equals(changed) and not original.equals(weight[:299])


@pytest.mark.parametrize("qmax", [127, QMAX_16BIT_SAFE])
def test_sums_over_the_largest_numbers_are_exact(make: Kernels, qmax: int) -> None:
    assert make.qmax in (127, QMAX_16BIT_SAFE)
    qmax = min(qmax, make.qmax)
    for sign in (1, -1):
        rows = Int8Rows(torch.full((8, 512), sign * qmax, dtype=torch.int8), torch.full((8,), 1 / qmax))
        for x in (torch.ones(3, 512), -torch.ones(3, 512)):
            torch.testing.assert_close(make.linear(rows)(x), sign * x.sum(-1, keepdim=True).expand(3, 8))


def test_with_avx2_alone_weights_have_half_the_levels_and_micro_still_understands() -> None:
    """FBGEMM adds pairs of products in 16 bits there. The variables are those of ``make test CPU=avx2``."""
    where = {**os.environ, **variables_of("avx2"), "PYTHONPATH": str(ROOT)}
    is_here = choose_linear() == FbgemmLinear.name and Kernels(linear=FbgemmLinear.name).qmax == QMAX_16BIT_SAFE
    command = [sys.executable, "-m", "tests.model.int8_with_avx2"]
    if not is_here:  # where it is, the test below asks micro
        command.append("--with-micro")
    done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["64"]), done.stderr


def test_torchs_kernel_is_onednn_with_amx_else_fbgemm_else_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, engines, expected in (
        (True, ["fbgemm"], OnednnLinear),
        (False, ["fbgemm"], FbgemmLinear),
        (False, ["qnnpack"], OnednnLinear),
    ):
        monkeypatch.setattr(linear, "torch_capabilities", lambda amx=amx: {"amx_int8": amx})
        monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", engines)
        assert choose_torch_linear() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_torch_linear() is None


def test_native_linears_come_first_and_torchs_where_none_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = choose_torch_linear()
    assert torchs is not None
    monkeypatch.setattr(kernels, "_gemm", lambda name: name)
    for names, compiling, chosen in (
        (["first", "second"], {"first", "second"}, "first"),
        (["first", "second"], {"second"}, "second"),
        (["first"], set[str](), torchs.name),
        ([], set[str](), torchs.name),
    ):
        monkeypatch.setattr(kernels, "native_linears", lambda names=names: names)
        monkeypatch.setattr(kernels, "_compiles", lambda _, name, compiling=compiling: name in compiling)
        assert choose_linear() == chosen


def test_micro_understands_in_int8() -> None:
    assert_micro_understands()
