"""What adapters take in memory is what the bank counts, and never more than there may be."""

from __future__ import annotations

import random

import pytest
import torch

from server.lora.weights import LoRAWeights
from tests.instruction_sets import NUMBA, needs
from tests.model.held import held_bytes
from tests.model.test_lora_bank import HIDDEN, Stage, adapter, ones, recipes, sequence, some_uses

BYTES = 4 * (3 * 4 * HIDDEN + 4 * (HIDDEN + 4 + 4))
"""Of an adapter of rank 4 on q, k and v."""


def kinds() -> dict[str, LoRAWeights]:
    """Adapters of two shapes, one of them with a rank that is padded, and one that is no plain delta."""
    made = {f"small {number}": adapter(number, ("q", "k", "v"), 4) for number in range(4)}
    made |= {f"odd {number}": adapter(10 + number, ("q", "down"), 9) for number in range(3)}
    return made | {"dora": adapter(20, ("down",), 4, scale=torch.rand(HIDDEN))}


@pytest.mark.parametrize(
    "native",
    [
        False,
        pytest.param(True, marks=needs(NUMBA)),
    ],
    ids=["batched", "native"],
)
def test_what_a_bank_keeps_is_what_it_counts_after_loading_running_and_unloading(*, native: bool) -> None:
    """Copies of adapters came on top of the budget, and of the metric."""
    stage = Stage(native=native)
    counted = 0
    for digest, weights in kinds().items():
        stage.adapters[digest] = weights
        counted += stage.bank.add(digest, weights)
        assert stage.bank.num_bytes == counted
        assert held_bytes(stage.bank) == counted + stage.bank.backend.num_bytes
        assert native or stage.bank.backend.num_bytes == 0
    assert counted == sum(weights.num_bytes for weights in kinds().values())
    stage.step([sequence(2 * number, [(digest, 1.0)], 1) for number, digest in enumerate(stage.adapters)])
    assert stage.bank.backend.num_bytes > 0
    assert held_bytes(stage.bank) == stage.bank.num_bytes + stage.bank.backend.num_bytes
    for digest in list(stage.adapters):
        stage.remove(digest)
        assert held_bytes(stage.bank) == stage.bank.num_bytes + stage.bank.backend.num_bytes
    assert held_bytes(stage.bank) == 0


@pytest.mark.parametrize("seed", range(2))
def test_weights_and_copies_stay_within_the_limit_in_whatever_mixture(seed: int) -> None:
    """With little room some adapters are computed side by side, some alone, and all of them right."""
    source = random.Random(seed)
    stage, made = Stage(), recipes(source)
    weights = [next(made) for _ in range(12)]
    limit = sum(one.num_bytes for one in weights) + 3000
    stage.limit(limit)
    for number, one in enumerate(weights):
        stage.add(str(number), one)
    fullest = 0
    for number in range(60):
        uses = [some_uses(source, stage.adapters) for _ in range(source.randint(2, 14))]
        stage.step([sequence(2 * place, use, source.choice((1, 1, 2, 5))) for place, use in enumerate(uses)])
        held = held_bytes(stage.bank)
        assert held == stage.bank.num_bytes + stage.bank.backend.num_bytes <= limit
        fullest = max(fullest, held)
        if number % 10 == 9:
            gone = source.choice(list(stage.adapters))
            again = stage.adapters[gone]
            stage.remove(gone)
            stage.add(gone, again)
    assert stage.num_groups > 5 and fullest > limit - 3000


def test_copies_give_way_to_weights_and_adapters_are_computed_one_by_one() -> None:
    stage = Stage()
    stage.limit(7 * BYTES)
    for number in range(4):
        stage.add(str(number), adapter(number, ("q", "k", "v"), 4))
    stage.step(ones("0", "1", "2"))
    assert (stage.bank.backend.num_bytes, len(stage.groups(3))) == (3 * BYTES, 1)
    stage.add("4", adapter(4, ("q", "k", "v"), 4))
    assert stage.bank.backend.num_bytes == 0
    stage.step(ones("0", "1", "2"))
    assert stage.bank.backend.num_bytes == 2 * BYTES
    assert [group.end - group.start for group in stage.groups(3)] == [2]
    stage.add("5", adapter(5, ("q", "k", "v"), 4))
    stage.step(ones("0", "1", "2"))
    assert (stage.bank.backend.num_bytes, stage.groups(3)) == (0, [])
    stage.remove("5")
    stage.step(ones("0", "1", "2"))
    assert stage.bank.backend.num_bytes == 2 * BYTES


def test_copies_of_adapters_that_do_not_run_make_room_for_those_that_do() -> None:
    """They stayed until the last adapter of their shape was gone."""
    stage = Stage()
    for number in range(4):
        stage.add(f"a{number}", adapter(number, ("q", "k", "v"), 4))
        stage.add(f"b{number}", adapter(number, ("q", "k"), 4))
    stage.limit(stage.bank.num_bytes + 4 * BYTES)
    stage.step(ones("a0", "a1", "a2", "a3"))
    assert stage.bank.backend.num_bytes == 4 * BYTES
    stage.step(ones("b0", "b1", "b2", "b3"))
    assert len(stage.groups(4)) == 1
    assert [slots.capacity for slots in stage.slots] == [0, 4]


def test_those_that_have_copies_keep_them_where_there_is_not_room_for_all() -> None:
    """Otherwise every step would copy anew."""
    stage = Stage()
    for number in range(4):
        stage.add(str(number), adapter(number, ("q", "k", "v"), 4))
    stage.limit(stage.bank.num_bytes + 2 * BYTES)
    stage.step(ones("2", "3", "0", "1"))
    (slots,) = stage.slots
    copied = {digest for digest in "0123" if slots.has_copy(digest)}
    for digests in ("0123", "3210", "1302"):
        stage.step(ones(*digests))
        assert {digest for digest in "0123" if slots.has_copy(digest)} == copied
