"""What a tape holds, what it refuses, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpu_kernels.passes import passes
from cpu_kernels.routine import Routine
from cpu_kernels.tape import Arena, NotTaped, Recorder, Tape, TooLarge, _Made
from tests.instruction_sets import NUMBA, needs

pytestmark = needs(NUMBA)


def made(size: int, first: int, last: int) -> _Made:
    return _Made(torch.empty(size, dtype=torch.uint8), first, last)


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
def test_what_computes_otherwise_than_routines_is_refused(what: str) -> None:
    """``torch.tensor`` looked like a view of what it had made itself."""
    x, recorder, arena = torch.randn(4, 4), Recorder(), Arena(1 << 12)

    def compute() -> torch.Tensor:
        REFUSED[what](x)
        return x + x

    result = recorder.record(compute)
    with pytest.raises(NotTaped, match="aten"):
        Tape.of(recorder, [x], result, arena)


@torch.inference_mode()
def test_views_new_tensors_sums_and_products_with_a_number_are_played_with_other_inputs() -> None:
    def compute(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        normed = passes().rms_norm(x, gain, 1e-5).view(2, 4, 4).transpose(0, 1)
        first, second = normed.transpose(0, 1).reshape(8, 4).split(4)
        gated: torch.Tensor = passes().gated(first + second * 0.22, x[4:]) + first
        return gated

    x, gain, recorder, nothing = torch.randn(8, 4), torch.rand(4), Recorder(), torch.empty(64)[:0]
    inputs = [nothing, x, x.view(-1)[4:]]
    tape = Tape.of(recorder, inputs, recorder.record(lambda: compute(x, gain)), Arena(1 << 12))
    assert set(tape.places[:, 1].tolist()) == {1, 2, 3}, (
        "the address of nothing is 0, and small numbers are no addresses"
    )
    for seed in range(3):
        other = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(tape.play([nothing, other, other.view(-1)[4:]]), compute(other, gain))


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda x: x, "no new tensor"),
        (lambda x: (x + x,), "no new tensor"),
        (lambda x: (x + x).t(), "no new tensor"),
        (lambda x: (x + x)[:2], "part of a tensor"),
        (lambda x: (x + x)[1:], "no new tensor"),
    ],
)
def test_a_result_must_be_a_tensor_of_its_own(function: Callable[[torch.Tensor], Any], problem: str) -> None:
    x, recorder = torch.randn(4, 4), Recorder()
    result = recorder.record(lambda: function(x))
    with pytest.raises(NotTaped, match=problem):
        Tape.of(recorder, [x], result, Arena(1 << 12))


def test_nothing_is_recorded_within_a_recording() -> None:
    with pytest.raises(AssertionError, match="at a time"):
        Recorder().record(lambda: Recorder().record(lambda: None))
    assert Routine.recorder is None
