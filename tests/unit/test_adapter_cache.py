"""Weights in memory: within the budget, in turn, and never freed under somebody who uses them."""

from __future__ import annotations

import asyncio
import random

import pytest

from server.adapters import adapter_cache as module
from server.adapters.adapter_cache import AdapterCache


class Memory:
    """A cache, and what it loaded and freed; loads wait for ``gate``, and fail for digests in ``bad``."""

    def __init__(self, max_bytes: int = 10) -> None:
        self.loaded: list[str] = []
        self.freed: list[str] = []
        self.unwanted: set[str] = set()
        self.bad: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.books = AdapterCache(
            max_bytes, unload=self.freed.append, is_wanted=lambda digest: digest not in self.unwanted
        )

    async def load(self, digest: str) -> int:
        await self.gate.wait()
        if digest in self.bad:
            raise OSError(digest)
        self.loaded.append(digest)
        return self.sizes[digest]

    async def hold(self, *digests: str, size: int = 4) -> None:
        self.sizes |= {digest: size for digest in digests if digest not in self.sizes}
        await self.books.hold(dict.fromkeys(digests, size), self.load)

    def hold_later(self, *digests: str, size: int = 4) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.hold(*digests, size=size))


@pytest.fixture
async def memory() -> Memory:
    return Memory()


async def test_weights_are_loaded_once_for_all_who_wait(memory: Memory) -> None:
    memory.gate.clear()
    waiting = [memory.hold_later("a") for _ in range(3)]
    await asyncio.sleep(0)
    assert memory.books.state("a") == "loading"
    memory.gate.set()
    await asyncio.gather(*waiting)
    assert (memory.loaded, memory.books.num_leases("a"), memory.books.state("a")) == (["a"], 3, "resident")


async def test_the_least_recently_used_makes_room(memory: Memory) -> None:
    for digest in ("a", "b", "a"):
        await memory.hold(digest)
        memory.books.release([digest])
    await memory.hold("c")
    assert (memory.freed, memory.books.digests) == (["b"], ["a", "c"])
    assert memory.books.num_evicted == 1


async def test_who_finds_no_room_waits_until_a_lease_ends(memory: Memory) -> None:
    await memory.hold("a")
    await memory.hold("b")
    third = memory.hold_later("c")
    await asyncio.sleep(0.01)
    assert (third.done(), len(memory.books._queue)) == (False, 1)
    memory.books.release(["a"])
    await third
    assert (memory.freed, memory.books.digests) == (["a"], ["b", "c"])


async def test_what_is_in_memory_is_had_past_those_who_wait_for_room(memory: Memory) -> None:
    await memory.hold("a")
    await memory.hold("b")
    third = memory.hold_later("c")
    await asyncio.sleep(0)
    await memory.hold("a")
    assert not third.done()
    memory.books.release(["a", "a"])
    await third


async def test_who_has_waited_long_goes_before_those_whose_weights_are_in_memory(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise requests for two busy adapters would keep a third one out for ever."""
    monkeypatch.setattr(module, "MAX_QUEUE_SECONDS", 0.0)
    await memory.hold("a")
    await memory.hold("b")
    third = memory.hold_later("c")
    await asyncio.sleep(0.01)
    again = memory.hold_later("a")
    await asyncio.sleep(0.01)
    assert not again.done()
    memory.books.release(["b"])
    await asyncio.gather(third, again)


async def test_several_adapters_are_had_together_or_not_at_all(memory: Memory) -> None:
    await memory.hold("a")
    await memory.hold("b")
    both = memory.hold_later("c", "d")
    await asyncio.sleep(0)
    memory.books.release(["a"])
    await asyncio.sleep(0)
    assert memory.books.state("c") is None
    memory.books.release(["b"])
    await both
    assert memory.books.digests == ["c", "d"]


async def test_pinned_weights_stay(memory: Memory) -> None:
    memory.books.pin(["a"])
    for digest in ("a", "b", "c"):
        await memory.hold(digest)
        memory.books.release([digest])
    assert memory.books.digests == ["a", "c"]
    memory.books.pin([])
    await memory.hold("d")
    assert memory.freed == ["b", "a"]


async def test_pins_that_fill_memory_lock_nobody_out(memory: Memory) -> None:
    memory.books.pin(["a", "b"])
    for digest in ("a", "b", "c"):
        await asyncio.wait_for(memory.hold(digest), 1)
        memory.books.release([digest])
    assert memory.books.digests == ["a", "b", "c"]


async def test_weights_that_nobody_can_ask_for_go_with_their_last_lease(memory: Memory) -> None:
    await memory.hold("a")
    await memory.hold("a")
    memory.unwanted.add("a")
    memory.books.release(["a"])
    memory.books.drop_unwanted("a")
    assert memory.freed == []
    memory.books.release(["a"])
    assert memory.freed == ["a"]


async def test_a_failed_load_is_told_to_all_who_wait_and_leaves_nothing(memory: Memory) -> None:
    memory.bad.add("a")
    results = await asyncio.gather(memory.hold("a"), memory.hold("a"), return_exceptions=True)
    assert all(isinstance(result, OSError) for result in results)
    memory.books.check_integrity()
    memory.bad.clear()
    await memory.hold("a")
    assert memory.books.digests == ["a"]


async def test_several_are_not_had_where_one_of_them_fails_first() -> None:
    """The one that failed while another was awaited was taken for loaded, and its absence broke the whole batch off."""
    memory, slow = Memory(), asyncio.Event()

    async def load(digest: str) -> int:
        if digest == "bad":
            raise OSError(digest)
        await slow.wait()
        return 4

    holding = asyncio.ensure_future(memory.books.hold({"good": 4, "bad": 4}, load))
    await asyncio.sleep(0.01)
    slow.set()
    with pytest.raises(OSError, match="bad"):
        await holding
    memory.books.check_integrity()
    assert memory.books.num_leases("good") == 0


async def test_room_that_a_failed_load_leaves_is_given_to_who_waits(memory: Memory) -> None:
    """Where nobody waited for that load any more, nobody was let in either, for ever."""
    memory.gate.clear()
    memory.bad.add("a")
    gone = memory.hold_later("a", size=10)
    await asyncio.sleep(0)
    waiting = memory.hold_later("b", size=10)
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    memory.gate.set()
    await asyncio.wait_for(waiting, 1)


async def test_weights_that_are_pinned_no_more_go_where_nobody_wants_them(memory: Memory) -> None:
    memory.books.pin(["a"])
    await memory.hold("a")
    memory.books.release(["a"])
    memory.unwanted.add("a")
    memory.books.drop_unwanted("a")
    assert memory.freed == []
    memory.books.pin([])
    assert memory.freed == ["a"]


async def test_a_waiter_who_leaves_disturbs_nobody(memory: Memory) -> None:
    memory.gate.clear()
    first, second = memory.hold_later("a"), memory.hold_later("a")
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    memory.gate.set()
    await second
    assert (memory.books.num_leases("a"), memory.loaded) == (1, ["a"])


async def test_a_place_in_the_queue_is_given_up_by_who_leaves(memory: Memory) -> None:
    await memory.hold("a", size=10)
    waiting = memory.hold_later("b", size=10)
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    memory.books.release(["a"])
    memory.books.check_integrity()
    assert (len(memory.books._queue), memory.books.num_leases("b"), memory.loaded) == (0, 0, ["a"])


async def test_weights_loaded_for_nobody_and_unwanted_do_not_stay(memory: Memory) -> None:
    memory.gate.clear()
    waiting = memory.hold_later("a")
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    memory.unwanted.add("a")
    memory.gate.set()
    await asyncio.sleep(0.01)
    assert (memory.freed, memory.books.num_bytes) == (["a"], 0)


@pytest.mark.parametrize("seed", range(5))
async def test_the_books_balance_after_a_storm(seed: int) -> None:
    """Random clients with random needs, some of whom leave: the budget holds, and nothing is leaked or stuck."""
    source, memory = random.Random(seed), Memory(12)

    async def client() -> None:
        needs = source.sample("abcdefgh", source.choice((1, 1, 1, 2)))
        await memory.hold(*needs)
        try:
            assert all(memory.books.state(digest) == "resident" for digest in needs)
            assert memory.books.num_bytes <= 12
            await asyncio.sleep(source.random() / 500)
        finally:
            memory.books.release(needs)

    clients = [asyncio.ensure_future(client()) for _ in range(80)]
    for one in source.sample(clients, 15):
        await asyncio.sleep(source.random() / 1000)
        one.cancel()
    results = await asyncio.wait_for(asyncio.gather(*clients, return_exceptions=True), 20)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
    memory.books.check_integrity()
    assert len(memory.books._queue) == 0
    assert not any(memory.books.num_leases(digest) for digest in "abcdefgh")


async def test_what_weights_really_take_is_counted_once_they_are_there(memory: Memory) -> None:
    """Half of what was reserved: on CPUs whose tiles are bfloat16 the budget held half of what it could."""
    memory.sizes |= {"a": 2, "b": 2, "c": 2}
    await memory.hold("a")
    assert memory.books.num_bytes == 2
    await memory.hold("b")
    third = memory.hold_later("c", size=6)
    await asyncio.wait_for(third, 1)
    assert (memory.books.num_bytes, memory.books.digests) == (6, ["a", "b", "c"])
    memory.books.check_integrity()


async def test_room_that_is_left_of_a_reservation_is_given_to_who_waits(memory: Memory) -> None:
    memory.sizes["a"] = 2
    memory.gate.clear()
    first, second = memory.hold_later("a", size=8), memory.hold_later("b", size=8)
    await asyncio.sleep(0.01)
    assert len(memory.books._queue) == 1
    memory.gate.set()
    await asyncio.wait_for(asyncio.gather(first, second), 1)
    assert memory.books.num_bytes == 10


async def test_idle_weights_leave_room_to_spare_and_weights_in_use_may_take_it(memory: Memory) -> None:
    memory.books.spare = 4
    await memory.hold("a", size=3)
    memory.books.release(["a"])
    await memory.hold("b", size=4)
    assert (memory.freed, memory.books.num_bytes) == (["a"], 4)
    await memory.hold("c", size=6)
    assert (memory.freed, memory.books.num_bytes) == (["a"], 10)
    memory.books.release(["b", "c"])
    await memory.hold("d", size=2)
    assert (memory.freed, memory.books.num_bytes) == (["a", "b", "c"], 2)


async def test_weights_that_take_more_than_was_reserved_make_room_for_themselves(memory: Memory) -> None:
    await memory.hold("a", size=4)
    memory.books.release(["a"])
    memory.sizes["b"] = 7
    await memory.hold("b", size=6)
    assert (memory.freed, memory.books.num_bytes) == (["a"], 7)
    memory.books.check_integrity()
