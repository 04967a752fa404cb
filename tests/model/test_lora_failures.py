"""An adapter that fails while it is added or removed, at any line and any operation of torch, leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import server.lora
from cpu_kernels.kernels import Kernels
from cpu_kernels.linear import Deltas
from server.lora.bank import LoRABank
from server.lora.delta import LoRADelta
from server.lora.slots import LoRASlots
from server.lora.weights import LoRAWeights
from tests.instruction_sets import NUMBA, needs
from tests.model.held import held_bytes
from tests.model.test_lora_bank import HIDDEN, Stage, adapter, ones

LORA = str(Path(server.lora.__file__).parent)
ENDED = "DefaultCPUAllocator: can't allocate memory"


class Lines:
    """Memory ends before the ``number``-th line of ``server/lora`` that is run."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._called)

    def __exit__(self, *given: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, given: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(LORA) else None

    def _line(self, frame: FrameType, event: str, given: Any) -> Any:
        self.left -= event == "line"
        if not self.left:
            self.left = -1
            raise MemoryError(ENDED)
        return self._line


class Operations(TorchDispatchMode):
    """Memory ends in the ``number``-th operation of torch."""

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise RuntimeError(ENDED)
        return func(*args, **(kwargs or {}))


Failing = type[Lines] | type[Operations]
every_way = pytest.mark.parametrize("way", [Lines, Operations])
every_bank = pytest.mark.parametrize(
    ("way", "native"),
    [
        pytest.param(Lines, False, id="lines"),  # without kernels, adding takes no operation of torch
        pytest.param(Lines, True, id="native-lines", marks=needs(NUMBA)),
        pytest.param(Operations, True, id="native-operations", marks=needs(NUMBA)),
    ],
)


def fails(way: Failing, number: int, action: Callable[[], object]) -> bool:
    """Do something, and make it fail there; whether it did."""
    try:
        with way(number):
            action()
    except (MemoryError, RuntimeError) as error:
        if ENDED not in str(error):
            raise
        return True
    return False


def every_failure(way: Failing, action: Callable[[], object]) -> Iterator[int]:
    """Make an action fail at the first place, the second, and so on, until it does not."""
    number = 1
    while fails(way, number, action):
        yield number
        number += 1
    assert number > 3, "hardly anything was made to fail"


def some_adapters() -> list[LoRAWeights]:
    """One that is there, and two that come and share modules with it: a plain one, and a DoRA."""
    dora = adapter(3, ("q", "down"), 3, scale=torch.rand(HIDDEN) + 0.5)
    return [adapter(1, ("q", "k", "down"), 4), adapter(2, ("q", "k", "v", "head"), 3), dora]


@every_bank
@pytest.mark.parametrize("which", [1, 2], ids=["plain", "dora"])
def test_an_adapter_that_cannot_be_added_leaves_nothing_and_can_be_added_again(
    way: Failing, which: int, *, native: bool
) -> None:
    """Half added, its clean-up raised a KeyError, and the engine was dead for everybody."""
    stage, weights = Stage(native=native), some_adapters()
    stage.add("there", weights[0])
    before = held_bytes(stage.bank)
    for _ in every_failure(way, lambda: stage.bank.add("new", weights[which])):
        stage.bank.check_integrity()
        assert held_bytes(stage.bank) == before
        stage.add("new", weights[which])
        stage.step(ones("there", "new"))
        stage.remove("new")
    stage.step(ones("there"))
    stage.bank.remove("new")
    stage.remove("there")
    assert all(type(module) is nn.Linear for module in stage.model.children())
    assert held_bytes(stage.bank) == 0


@every_bank
def test_an_adapter_that_cannot_be_removed_is_removed_with_the_next_one(way: Failing, *, native: bool) -> None:
    stage, weights = Stage(native=native), some_adapters()
    stage.add("there", weights[0])
    before = held_bytes(stage.bank)
    stage.add("going", weights[1])
    for number in every_failure(way, lambda: stage.bank.remove("going")):
        stage.compute(ones("there"))
        finish(stage, number)
        stage.bank.check_integrity()
        assert held_bytes(stage.bank) == before
        stage.bank.add("going", weights[1])
        stage.step(ones("there", "going"))
        for slots in () if native else stage.slots:
            slots.clear()
    stage.step(ones("there"))


def finish(stage: Stage, number: int) -> None:
    """Something that makes the bank finish a removal, in turns."""
    if number % 3 == 0:
        stage.bank.remove("going")
    elif number % 3 == 1:
        stage.bank.remove("of nobody")
    else:
        stage.bank.add("another", adapter(3, ("v", "down"), 3))
        stage.bank.remove("another")
    stage.bank.remove("going")  # where it failed before its first line


@every_way
def test_adapters_whose_copies_cannot_be_made_are_computed_one_by_one(way: Failing) -> None:
    """A slot was given away before its copy was made: the steps after a failure computed with what lay there."""
    stage = Stage()
    for number in range(3):
        stage.add(str(number), adapter(number, ("q", "v"), 4))
    (slots,) = stage.slots
    assert stage.batched is not None
    for number in range(1, 1000):
        slots.clear()
        stage.batched._without_copies.clear()
        failed = fails(way, number, lambda: slots.place(["0", "1", "2"]))
        stage.step(ones("0", "1", "2"))
        if not failed:
            break
    assert 10 < number < 999


def test_a_step_without_memory_for_copies_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    for number in range(2):
        stage.add(str(number), adapter(number, ("q", "v"), 4))

    def place(*given: object, **named: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(LoRASlots, "place", place)
        for _ in range(3):
            stage.step(ones("0", "1"))
            assert stage.groups(2) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    stage.add("2", adapter(2, ("q",), 4))
    stage.remove("2")
    stage.step(ones("0", "1"))
    assert len(stage.groups(2)) == 1


class Fused:
    """A product of linears that adds deltas itself; nothing is ever computed with it."""

    deltas: Deltas | None = None


def deltas_of(product: Fused) -> Deltas | None:
    """What the product adds by now."""
    return product.deltas


@needs(NUMBA)
@every_way
def test_an_adapter_in_tiles_that_cannot_be_added_leaves_no_address_of_it(way: Failing) -> None:
    """What is read by a linear's kernel on a CPU with AMX is looked at here on any."""
    from server.lora.native import NativeLoRA

    sizes = {"q": 32, "k": 64}
    model, product = nn.Module(), Fused()
    for name, size in sizes.items():
        model.add_module(name, nn.Linear(64, size))
    kernels = Kernels(native=True).ready()
    backend = NativeLoRA(["", *sizes], [(product, list(sizes.items()))], kernels=kernels, max_seqs=4)
    bank = LoRABank(model, backend)
    weights = LoRAWeights(
        {name: LoRADelta("linear", torch.rand(64, 3), torch.rand(3, size)) for name, size in sizes.items()}
    )
    for _ in every_failure(way, lambda: bank.add("it", weights)):
        bank.check_integrity()
        assert deltas_of(product) is None and held_bytes(bank) == 0
        assert not any(table.any() for table in backend._tables.values())
    assert deltas_of(product) is not None and held_bytes(bank) == bank.num_bytes + backend.num_bytes
    assert {int(table.count_nonzero()) for table in backend._tables.values()} == {4}
    bank.remove("it")
    assert deltas_of(product) is None and held_bytes(bank) == 0


@needs(NUMBA)
@every_way
def test_tables_that_cannot_grow_are_what_they_were(way: Failing) -> None:
    stage = Stage(native=True)
    for number in range(8):
        stage.add(str(number), adapter(number, ("q", "down"), 2))
    ninth = adapter(8, ("q", "v"), 2)
    for _ in every_failure(way, lambda: stage.bank.add("8", ninth)):
        stage.step(ones("0", "7", "3"))
    stage.adapters["8"] = ninth
    stage.step(ones(*map(str, range(9))))
