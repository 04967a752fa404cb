"""Whatever mixture a step has, its rows are those of each adapter by itself, and the accounting of slots is right."""

from __future__ import annotations

import random
from collections import abc
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn

from cpu_kernels.kernels import Kernels
from server.lora.backend import LoRABackend
from server.lora.bank import LoRABank
from server.lora.batched import BatchedTorchLoRA, PaddedGroup, computed_together
from server.lora.delta import LoRADelta
from server.lora.slots import LoRASlots
from server.lora.weights import FusedA, LoRAWeights
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence
from tests.tables import wide

HIDDEN, WIDE, VOCAB = 12, 20, 15
SEEDS = [0, pytest.param(1, marks=wide), pytest.param(2, marks=wide)]
SIZES = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, 4), "v": (HIDDEN, 4), "down": (WIDE, HIDDEN), "head": (HIDDEN, VOCAB)}
GROUPS = (("q", "k", "v"),)
TARGETS = (("q", "v"), ("q", "k", "v", "down"), ("k",), tuple(SIZES))


class Model(nn.Module):
    """Linears of which three receive the same tensor, and a head that gets the sampled rows only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, (inside, outside) in SIZES.items():
            self.add_module(name, nn.Linear(inside, outside, dtype=dtype))

    def forward(self, x: torch.Tensor, wide: torch.Tensor, sampled: torch.Tensor) -> dict[str, torch.Tensor]:
        """x [1, rows, hidden], wide [1, rows, wide] -> each linear's result [rows, out]."""
        inputs = {"q": x, "k": x, "v": x, "down": wide, "head": x[:, sampled]}
        return {name: self.get_submodule(name)(one)[0] for name, one in inputs.items()}


def adapter(seed: int, targets: abc.Sequence[str], rank: int, *, scale: torch.Tensor | None = None) -> LoRAWeights:
    """Random deltas; A of q, k and v in one tensor where they have them."""
    generator = torch.Generator().manual_seed(seed)
    own = {name: torch.randn(rank, SIZES[name][0], generator=generator) for name in targets}
    together = [name for name in GROUPS[0] if name in targets]
    whole = torch.cat([own[name] for name in together]) if together else torch.empty(0)
    columns = {name: slice(place * rank, (place + 1) * rank) for place, name in enumerate(together)}
    deltas = {
        name: LoRADelta(
            "linear",
            (whole[columns[name]] if name in columns else own[name]).t(),
            torch.randn(rank, SIZES[name][1], generator=generator),
            scale if name == "down" else None,
        )
        for name in targets
    }
    return LoRAWeights(deltas, 1.0, [FusedA(whole.t(), columns)] if len(together) > 1 else [])


def sequence(number: int, uses: abc.Sequence[tuple[str, float]], length: int) -> Segment:
    """A segment of a sequence; an odd number's prompt goes on, so that it is not sampled."""
    prompt = tuple(range(length + (number % 2 if length > 1 else 0)))
    adapters = tuple(LoRARequest(*use) for use in uses)
    return Segment(Sequence(number, prompt, 9, SamplingParams(), adapters), number, 0, length)


def native_lora(model: nn.Module, *, max_seqs: int = 16) -> LoRABackend:
    """The backend of kernels, for any linear of a model."""
    from server.lora.native import NativeLoRA

    kernels = Kernels(native=True).ready()
    return NativeLoRA([name for name, _ in model.named_modules()], kernels=kernels, max_seqs=max_seqs)


class Stage:
    """A bank on a model, and the same model without."""

    def __init__(self, *, max_slots: int = 16, dtype: torch.dtype = torch.float32, native: bool = False) -> None:
        torch.manual_seed(0)
        self.model, self.base = Model(dtype), Model(dtype)
        self.base.load_state_dict(self.model.state_dict())
        self.batched = None if native else BatchedTorchLoRA(GROUPS, max_slots=max_slots, device=torch.device("cpu"))
        self.bank = LoRABank(self.model, self.batched or native_lora(self.model, max_seqs=max_slots))
        self.adapters: dict[str, LoRAWeights] = {}
        self.dtype, self.num_groups = dtype, 0

    def add(self, digest: str, weights: LoRAWeights) -> None:
        """Put an adapter in."""
        self.adapters[digest] = weights
        self.bank.add(digest, weights)

    def remove(self, digest: str) -> None:
        """Take an adapter out."""
        del self.adapters[digest]
        self.bank.remove(digest)

    def step(self, segments: abc.Sequence[Segment], *, tolerance: float = 1e-4) -> Batch:
        """A step, whose rows are compared, and an integrity check behind it."""
        batch = self.compute(segments, tolerance=tolerance)
        self.bank.check_integrity()
        return batch

    @torch.inference_mode()
    def compute(self, segments: abc.Sequence[Segment], *, tolerance: float = 1e-4) -> Batch:
        """Every row is compared with the base's and its adapters' own products."""
        batch = self.bank.begin_sorted(Batch(tuple(segments)))
        assert sorted(one.sequence.id for one in batch.segments) == sorted(one.sequence.id for one in segments)
        rows = [one.sequence.adapters for one in batch.segments for _ in range(one.length)]
        ends = [sum(s.length for s in batch.segments[: n + 1]) - 1 for n, s in enumerate(batch.segments) if s.samples]
        x, wide = (torch.randn(1, len(rows), size, dtype=self.dtype) for size in (HIDDEN, WIDE))
        found, plain = (model(x, wide, torch.tensor(ends, dtype=torch.long)) for model in (self.model, self.base))
        self.num_groups += len(self.groups(len(rows)))
        for name in SIZES:
            at = ends if name == "head" else range(len(rows))
            for number, row in enumerate(at):
                if not rows[row]:
                    assert torch.equal(found[name][number], plain[name][number])
                source = (wide if name == "down" else x)[0, row].float()
                expected = self._expected(name, source, plain[name][number].float(), rows[row])
                assert torch.allclose(found[name][number].float(), expected, atol=tolerance, rtol=tolerance)
        return batch

    def _expected(self, name: str, x: torch.Tensor, y: torch.Tensor, uses: abc.Sequence[LoRARequest]) -> torch.Tensor:
        for use in uses:
            if (delta := self.adapters[use.digest].deltas.get(name)) is not None:
                assert delta.a is not None and delta.b is not None
                y = (y if delta.scale is None else y * delta.scale) + x @ delta.a @ delta.b * use.scale
        return y

    @property
    def slots(self) -> list[LoRASlots]:
        """Copies of adapters, by shape."""
        assert self.batched is not None
        return list(self.batched._slots.values())

    def groups(self, num_rows: int) -> abc.Sequence[PaddedGroup]:
        """Rows of adapters that the last step computed together."""
        return () if self.batched is None else self.batched.layout(num_rows).groups

    def limit(self, max_bytes: int) -> None:
        """Weights and copies may take so many bytes from now on."""
        self.bank._max_bytes = max_bytes
        self.bank._limit_copies()


@pytest.fixture
def stage() -> Iterator[Stage]:
    one = Stage()
    yield one
    one.bank.check_integrity()


def recipes(source: random.Random) -> Iterator[LoRAWeights]:
    """Adapters of a few shapes, now and then one that is no plain delta."""
    for seed in range(10_000):
        targets, rank = source.choice(TARGETS), source.choice((2, 3, 8, 9))
        scale = torch.rand(HIDDEN) + 0.5 if source.random() < 0.1 and "down" in targets else None
        yield adapter(seed, targets, rank, scale=scale)


def some_uses(source: random.Random, adapters: Mapping[str, LoRAWeights]) -> list[tuple[str, float]]:
    """None, one as it is or at a weight, or a composition."""
    plain = [digest for digest, weights in adapters.items() if weights.composable]
    kind = source.random()
    if kind < 0.15 or not plain:
        return []
    if kind < 0.75:
        return [(source.choice(list(adapters)), 1.0)]
    count = 1 if kind < 0.9 else min(2, len(plain))
    return [(digest, source.choice((0.5, -1.25, 1.0))) for digest in source.sample(plain, count)]


def storm(stage: Stage, seed: int) -> None:
    """Adapters come and go; ranks, targets, rows, weights and compositions change with every step."""
    source = random.Random(seed)
    made, running = recipes(source), list[tuple[list[tuple[str, float]], int]]()
    for number in range(150):
        if len(stage.adapters) < 3 or source.random() < 0.2:
            stage.add(f"{seed}-{number}", next(made))
        if len(stage.adapters) > 12:
            gone = source.choice(list(stage.adapters))
            running = [one for one in running if all(digest != gone for digest, _ in one[0])]
            stage.remove(gone)
        running = [one for one in running if source.random() > 0.15]
        while len(running) < source.randint(1, 14):
            running.append((some_uses(source, stage.adapters), source.choice((1, 1, 1, 1, 2, 5, 30))))
        source.shuffle(running)
        stage.step([sequence(id_, uses, length) for id_, (uses, length) in enumerate(running)])
    for digest in list(stage.adapters):
        stage.remove(digest)
    assert stage.batched is None or (stage.slots == [] and stage.batched.num_bytes == 0)
    assert all(type(module) is nn.Linear for module in stage.model.children())


@pytest.mark.parametrize("seed", SEEDS)
def test_random_mixtures_are_what_each_adapter_gives_by_itself(seed: int, stage: Stage) -> None:
    storm(stage, seed)
    assert stage.num_groups > 50


def ones(*digests: str) -> list[Segment]:
    """One row on each."""
    return [sequence(number * 2, [(digest, 1.0)], 1) for number, digest in enumerate(digests)]


def test_a_batch_of_base_rows_does_not_reach_the_adapters(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.add("a", adapter(1, ("q", "v"), 4))
    stage.step(ones("a"))
    monkeypatch.setattr(
        "server.lora.batched.SharedLoRAInput.take", lambda *given: pytest.fail("an adapter was looked at")
    )
    stage.step([sequence(0, [], 1), sequence(2, [], 3)])


def test_equal_rows_need_no_index_and_unequal_ones_come_out_right(stage: Stage) -> None:
    for digest in "abcd":
        stage.add(digest, adapter(ord(digest), ("q", "k", "v", "down"), 4))
    stage.step(ones(*"abcdabcd"))
    (group,) = stage.groups(8)
    assert (group.most, group.back) == (2, None)
    batch = stage.step(ones(*"abcdabc"))
    (group,) = stage.groups(7)
    assert group.most == 2 and group.back is not None
    runs = [segment.sequence.adapters[0].digest for segment in batch.segments]
    assert len([n for n in range(7) if n == 0 or runs[n] != runs[n - 1]]) == 4


def test_a_long_run_goes_by_itself_and_one_adapter_needs_no_copy(stage: Stage) -> None:
    for digest in "abc":
        stage.add(digest, adapter(ord(digest), ("q",), 4))
    stage.step(ones("a", "a"))
    assert stage.bank.backend.num_bytes == 0
    stage.step([*ones("a", "b"), sequence(8, [("c", 1.0)], 100)])
    assert [group.end - group.start for group in stage.groups(102)] == [2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"a": 1}, ""),
        ({"a": 1, "b": 1}, "ab"),
        ({"a": 100, "b": 100}, ""),
        ({"a": 1, "b": 300, "c": 1}, "ac"),
        (dict.fromkeys("abcdefgh", 8), "abcdefgh"),
        ({**dict.fromkeys("abcdefg", 1), "h": 8}, "abcdefg"),
        ({**dict.fromkeys("abcd", 1), **dict.fromkeys("efgh", 2)}, "abcdefgh"),
    ],
)
def test_what_is_padded_too_much_is_computed_alone(rows: dict[str, int], expected: str) -> None:
    assert computed_together(rows) == list(expected)


def test_a_large_rank_has_slots_of_its_own(stage: Stage) -> None:
    for number, rank in enumerate((3, 4, 64, 33)):
        stage.add(str(number), adapter(number, ("q", "v"), rank))
    stage.step(ones("0", "1", "2", "3"))
    assert sorted(slots.high["q"].shape[1] for slots in stage.slots) == [4, 64]
    assert [slots.high["q"].shape[0] for slots in stage.slots] == [2, 2]


def test_slots_double_up_to_the_bound() -> None:
    stage = Stage(max_slots=6)
    names = [str(number) for number in range(7)]
    for number, digest in enumerate(names):
        stage.add(digest, adapter(number, ("q",), 2))
    for count, capacity in ((2, 2), (3, 4), (5, 6), (6, 6), (2, 6)):
        stage.step(ones(*names[:count]))
        assert stage.slots[0].capacity == capacity
    stage.step(ones(*names))
    assert stage.groups(7) == []


def test_an_unused_slot_is_computed_for_a_while_and_then_closed(stage: Stage) -> None:
    for digest in "abcd":
        stage.add(digest, adapter(ord(digest), ("q", "k"), 2))
    stage.step(ones(*"abcd"))
    (slots,) = stage.slots
    middle = [digest for digest, slot in slots.place("abcd").items() if slot != 1]
    widths = []
    for _ in range(5):
        stage.step(ones(*middle))
        widths.append(slots.num_window)
    assert widths == [4, 4, 3, 3, 3]


def test_a_newcomer_takes_the_slot_that_was_idle_for_longest(stage: Stage) -> None:
    for digest in "abcdef":
        stage.add(digest, adapter(ord(digest), ("q",), 2))
    stage.step(ones(*"abcd"))
    (slots,) = stage.slots
    by_slot = sorted("abcd", key=slots.place("abcd").__getitem__)
    stage.step(ones(*by_slot[:2]))
    stage.step(ones(*"ef"))
    assert set(by_slot[:2]) | set("ef") == set(slots._slots)


def test_an_adapter_that_is_removed_gives_up_its_slot_and_the_last_one_the_tensors(stage: Stage) -> None:
    for digest in "abc":
        stage.add(digest, adapter(ord(digest), ("q", "v"), 2))
    stage.step(ones(*"abc"))
    stage.remove("b")
    stage.add("b", adapter(99, ("q", "v"), 2))
    stage.step(ones(*"abc"))
    assert stage.bank.backend.num_bytes > 0
    for digest in "abc":
        stage.remove(digest)
    assert stage.bank.backend.num_bytes == 0


def test_modules_that_share_an_input_share_one_product(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    stock = torch.bmm
    for digest in "ab":
        stage.add(digest, adapter(ord(digest), ("q", "k", "v"), 4))

    def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(y.shape)
        return stock(x, y)

    monkeypatch.setattr(torch, "bmm", bmm)
    stage.step(ones("a", "b"))
    assert [shape for shape in calls if shape[1] == HIDDEN] == [(2, HIDDEN, 12)]


@torch.inference_mode()
def test_a_module_called_again_with_the_same_tensor_and_one_not_called_at_all(stage: Stage) -> None:
    stage.add("a", adapter(1, ("q", "v"), 4))
    stage.bank.begin_sorted(Batch(tuple(ones("a", "a"))))
    x, q = torch.randn(1, 2, HIDDEN), stage.model.get_submodule("q")
    first, again = q(x), q(x)
    assert torch.equal(first, again) and not torch.equal(first, stage.base.get_submodule("q")(x))
    stage.step(ones("a"))
    assert stage.batched is not None and stage.batched._inputs["q"]._x is None


def test_rows_of_the_base_come_first_and_those_of_one_adapter_lie_side_by_side(stage: Stage) -> None:
    """Whether their adapters are in slots or not; sequences of one adapter keep their order."""
    for digest, rank in (("a", 4), ("b", 4), ("c", 8)):
        stage.add(digest, adapter(ord(digest), ("q",), rank))
    uses = ["b", None, "c", "a", "b", None, "c", "a"]
    segments = [sequence(2 * n, [(use, 1.0)] if use else [], 1) for n, use in enumerate(uses)]
    batch = stage.step(segments)
    ids = [segment.sequence.id // 2 for segment in batch.segments]
    in_slots = [[0, 4], [3, 7]] if ids[2] == 0 else [[3, 7], [0, 4]]
    assert ids == [1, 5, *in_slots[0], *in_slots[1], 2, 6]


def test_a_bfloat16_base_gets_deltas_in_float32() -> None:
    stage = Stage(dtype=torch.bfloat16)
    for digest in "abc":
        stage.add(digest, adapter(ord(digest), ("q", "k", "v"), 4))
    stage.step(ones(*"abc"), tolerance=1e-2)
    stage.step(ones(*"abca"), tolerance=1e-2)
    stage.step(ones(*"aa"), tolerance=1e-2)


@torch.inference_mode()
def test_a_result_that_is_part_of_a_wider_one_is_added_to_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    for digest in "ab":
        stage.add(digest, adapter(ord(digest), ("q",), 4))
    wide = torch.zeros(1, 3, 50)
    layer = stage.bank._layers["q"]
    monkeypatch.setattr(layer, "_compute", lambda x: wide[..., 7 : 7 + HIDDEN])
    for names, num_groups in (("ab", 1), ("aba", 1), ("a", 0)):
        wide = torch.zeros(1, len(names), 50)
        stage.bank.begin_sorted(Batch(tuple(ones(*names))))
        assert len(stage.groups(len(names))) == num_groups
        y = stage.model.get_submodule("q")(torch.randn(1, len(names), HIDDEN))
        assert torch.equal(wide[..., 7 : 7 + HIDDEN], y) and y.any() and not wide[..., 7 + HIDDEN :].any()
