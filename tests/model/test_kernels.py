"""One interface for a model's operations: the same numbers whoever computes them, each chosen for itself."""

from __future__ import annotations

import threading

import pytest
import torch

from cpu_kernels import kernels
from cpu_kernels.int8_weights import Int8Rows
from cpu_kernels.kernels import Kernels, choose_kernels
from cpu_kernels.linear import FbgemmLinear, quieten_deprecations
from cpu_kernels.native_ops import NativeOps
from tests.instruction_sets import NUMBA, needs

pytestmark = needs(NUMBA)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def native() -> Kernels:
    return Kernels(native=True).ready()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 5, 896), (7, 33), (1, 4, 3, 16)])
def test_norms_and_sums_are_the_same_by_torch_and_natively(native: Kernels, shape: tuple[int, ...]) -> None:
    torchs, gain = Kernels(), random(shape[-1], seed=1)
    x, other = random(*shape, seed=2), random(*shape, seed=3)
    for chosen in (native, torchs):
        norm = chosen.rms_norm(gain, 1e-5)
        assert_close(norm(x), torch.rms_norm(x, shape[-1:], gain, 1e-5))
        total, added = x.clone(), x.clone()
        normed = norm.of_sum(total, other)
        assert torch.equal(total, x + other) and torch.equal(normed, norm(x + other))
        chosen.add_(added, other)
        assert torch.equal(added, x + other)


def test_rotary_embeddings_and_gated_units_are_the_same_by_torch_and_natively(native: Kernels) -> None:
    torchs, angles = Kernels(), random(1, 5, 16, seed=1)
    q, k = random(1, 4, 5, 16), random(1, 2, 5, 16, seed=2)
    ours, theirs = (chosen.rotary_embedding(q, k, angles.cos(), angles.sin()) for chosen in (native, torchs))
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])
    gate, up = random(1, 5, 48), random(1, 5, 48, seed=3)
    assert_close(native.silu_and_mul(gate, up), torchs.silu_and_mul(gate, up))
    assert_close(native.gelu_and_mul(gate, up), torchs.gelu_and_mul(gate, up))
    assert torch.equal(gate, random(1, 5, 48)), "they are new tensors"


def natively(chosen: Kernels, kv_dtype: torch.dtype = torch.float32) -> set[str]:
    """Names of the operations that are not torch's, but for linears and AMX's attention of prompts."""
    names = {
        name for name in NativeOps.KERNELS if isinstance(getattr(getattr(chosen, name), "__self__", None), NativeOps)
    }
    others = {
        "add_deltas": chosen.add_deltas,
        "softmax_rows": chosen.softmax_rows,
        "attention": chosen.attention(kv_dtype),
    }
    return names | {name for name, operation in others.items() if operation is not None}


EVERYTHING = {*NativeOps.KERNELS, "add_deltas", "softmax_rows", "attention"}


def test_operations_are_native_where_they_are_asked_for() -> None:
    chosen = Kernels(native=True, kv_dtype=torch.bfloat16).ready()
    assert natively(chosen, torch.bfloat16) == EVERYTHING
    assert chosen.attention(torch.float32) is not None and chosen.attention(torch.float16) is None
    assert natively(Kernels().ready()) == set()
    assert natively(Kernels(native=True).ready(torch.bfloat16)) == {"attention"}, "the others compute in float32"


def test_a_base_in_integers_is_native_but_for_linears_that_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX2 alone everything was torch's, as its linears were."""
    monkeypatch.setattr(kernels, "native_linears", list)
    chosen = choose_kernels(int8=True, kv_dtype=torch.float32).ready()
    assert chosen.linear_name is not None and natively(chosen) == EVERYTHING
    assert not chosen.records_layers, "a call of torch cannot be replayed"


def test_a_base_in_floats_uses_kernels_in_c_and_waits_for_no_compiler() -> None:
    chosen = choose_kernels(int8=False, kv_dtype=torch.float32)
    assert natively(chosen) == EVERYTHING
    chosen.ready()
    assert chosen.linear_name is None and natively(chosen) == EVERYTHING and not chosen.records_layers
    assert natively(chosen.ready(torch.bfloat16)) == {"attention"}


def test_a_linear_says_what_it_can_do() -> None:
    quieten_deprecations()
    chosen = Kernels(linear=FbgemmLinear.name)
    linear = chosen.linear(Int8Rows.of([random(32, 64)], qmax=chosen.qmax))
    assert (linear.num_outputs, linear.num_inputs) == (32, 64)
    assert linear.gated is None and not linear.can_add_deltas([32])


def test_nothing_is_compiled_for_a_base_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing multiplies integers, a thread compiled kernels, for which the process waited before it ended."""
    monkeypatch.setattr(kernels, "choose_linear", lambda: None)
    before = set(threading.enumerate())
    chosen = choose_kernels(int8=True, kv_dtype=torch.float32)
    assert set(threading.enumerate()) <= before
    assert chosen.linear_name is None and natively(chosen.ready()) == set()
