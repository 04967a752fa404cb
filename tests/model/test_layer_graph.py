"""What a layer graph holds, what it refuses, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpu_kernels.kernels import Kernels
from cpu_kernels.layer_graph import Arena, GraphRecorder, LayerGraph, NotRecordable, TooLarge, _NewTensor
from cpu_kernels.native_kernel import Launcher
from cpu_kernels.native_ops import NativeOps
from tests.instruction_sets import NUMBA, needs

pytestmark = needs(NUMBA)


def made(size: int, first: int, last: int) -> _NewTensor:
    return _NewTensor(torch.empty(size, dtype=torch.uint8), first, last)


def test_what_is_in_use_at_the_same_time_does_not_overlap_in_the_arena() -> None:
    generator = torch.Generator().manual_seed(0)
    arena = Arena(1 << 20)
    assert arena.address % 64 == 0
    for _ in range(50):
        numbers = torch.randint(0, 30, (25, 3), generator=generator).tolist()
        some = [made(1 + 50 * size, min(times), max(times)) for size, *times in numbers]
        offsets = arena.arrange(some)
        for one in some:
            begin = offsets[one.begin]
            assert begin % 64 == 0 and 0 <= begin <= arena.num_bytes - one.size
            for other in some:
                if other is not one and other.first <= one.last and one.first <= other.last:
                    assert begin + one.size <= offsets[other.begin] or offsets[other.begin] + other.size <= begin


def test_the_arena_uses_places_again_and_refuses_what_does_not_fit() -> None:
    arena = Arena(256)
    one, two, three = made(128, 0, 1), made(128, 1, 2), made(128, 2, 3)
    offsets = arena.arrange([one, two, three])
    assert sorted(offsets.values()) == [0, 0, 128]
    with pytest.raises(TooLarge, match="256 bytes"):
        arena.arrange([one, two, made(1, 0, 3)])


REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "in_place": lambda x: x.view(-1).add_(1.0),
    "a_product": lambda x: x * x,
    "a_product_of_columns": lambda x: x[:, :2] * 0.5,
    "a_product_with_an_integer": lambda x: x * 2,
    "a_sum_with_a_number": lambda x: x + 1.0,
    "a_sum_of_a_row": lambda x: x + x[:1],
    "a_scaled_sum": lambda x: torch.add(x, x, alpha=2),
    "a_sum_of_columns": lambda x: x[:, :2] + x[:, 1:3],
    "a_comparison": lambda x: x > 0,
    "equality": lambda x: torch.equal(x, x),
    "an_item": lambda x: float(x[0, 0].item()),
    "a_branch": lambda x: 1 if x.sum() > 0 else 2,
    "a_copy": lambda x: x.t().contiguous(),
    "other_numbers": lambda x: x.double(),
    "zeros": lambda x: torch.zeros(3),
    "constants": lambda x: torch.tensor([1.0, 2.0]),
    "chance": lambda x: torch.rand(3),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_computes_otherwise_than_native_kernels_is_refused(what: str) -> None:
    """``torch.tensor`` looked like a view of what it had made itself."""
    x, recorder, arena = torch.randn(4, 4), GraphRecorder(Launcher()), Arena(1 << 12)

    def compute() -> torch.Tensor:
        REFUSED[what](x)
        return x + x

    result = recorder.record(compute)
    with pytest.raises(NotRecordable, match="aten"):
        LayerGraph.of(recorder, [x], result, arena)


@torch.inference_mode()
def test_views_new_tensors_sums_and_products_with_a_number_are_replayed_with_other_inputs() -> None:
    launch = Launcher()
    ops = NativeOps(launch)

    def compute(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        normed = ops.rms_norm(gain, 1e-5)(x).view(2, 4, 4).transpose(0, 1)
        first, second = normed.transpose(0, 1).reshape(8, 4).split(4)
        gated: torch.Tensor = ops.silu_and_mul(first + second * 0.22, x[4:]) + first
        return gated

    x, gain, recorder, nothing = torch.randn(8, 4), torch.rand(4), GraphRecorder(launch), torch.empty(64)[:0]
    inputs = [nothing, x, x.view(-1)[4:]]
    graph = LayerGraph.of(recorder, inputs, recorder.record(lambda: compute(x, gain)), Arena(1 << 12))
    assert set(graph.places[:, 1].tolist()) == {1, 2, 3}, (
        "the address of nothing is 0, and small numbers are no addresses"
    )
    for seed in range(3):
        other = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(graph.replay([nothing, other, other.view(-1)[4:]]), compute(other, gain))


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda x: x, "not a new contiguous tensor"),
        (lambda x: (x + x,), "not a new contiguous tensor"),
        (lambda x: (x + x).t(), "not a new contiguous tensor"),
        (lambda x: (x + x)[:2], "part of a tensor"),
        (lambda x: (x + x)[1:], "not a new contiguous tensor"),
    ],
)
def test_a_result_must_be_a_tensor_of_its_own(function: Callable[[torch.Tensor], Any], problem: str) -> None:
    x, recorder = torch.randn(4, 4), GraphRecorder(Launcher())
    result = recorder.record(lambda: function(x))
    with pytest.raises(NotRecordable, match=problem):
        LayerGraph.of(recorder, [x], result, Arena(1 << 12))


def test_nothing_is_recorded_within_a_recording() -> None:
    launch = Launcher()
    with pytest.raises(AssertionError, match="at a time"):
        GraphRecorder(launch).record(lambda: GraphRecorder(launch).record(lambda: None))
    assert not launch.is_recording


def test_two_models_do_not_see_each_others_recording() -> None:
    """The recorder was one for the process: what another model computed meanwhile came into the graph."""
    one, other = Kernels(native=True).ready(), Kernels(native=True).ready()
    x, gain, noise = torch.randn(8, 4), torch.rand(4), torch.randn(6, 4)
    calls_of_other: list[int] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        normed = one.rms_norm(gain, 1e-5)(x)
        with other.launch.recording() as calls:
            other.rms_norm(gain, 1e-5)(noise)
        calls_of_other.append(len(calls))
        assert one.launch.is_recording and not other.launch.is_recording
        return one.silu_and_mul(normed, x)

    recorder = GraphRecorder(one.launch)
    graph = LayerGraph.of(recorder, [x], recorder.record(lambda: compute(x)), Arena(1 << 12))
    assert (len(recorder.calls), calls_of_other) == (2, [1])
    again = torch.randn(8, 4)
    assert torch.equal(graph.replay([again]), one.silu_and_mul(one.rms_norm(gain, 1e-5)(again), again))


def test_workspaces_belong_to_one_model_and_are_new_while_it_is_recorded() -> None:
    one, other = Launcher(), Launcher()
    kept = one.workspace("units", 100, reuse=True)
    assert one.workspace("units", 60, reuse=True).data_ptr() == kept.data_ptr()
    assert other.workspace("units", 100, reuse=True).data_ptr() != kept.data_ptr()
    assert one.workspace("units", 100, reuse=False).data_ptr() != kept.data_ptr()
    with one.recording():
        assert one.workspace("units", 100, reuse=True).data_ptr() != kept.data_ptr()
