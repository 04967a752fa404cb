"""Records a layer's calls of native kernels, and replays them with other tensors in one call.

Between kernels, whose work is microseconds, a decoding step spends most of its time in Python, whose own memory the
weights have just swept out of the caches. A layer graph is what CUDA graphs are on a GPU: the same calls,
without Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpu_kernels.intrinsics import barrier, call, longs, thread_number
from cpu_kernels.native_kernel import Call, Launcher, NativeKernel
from cpu_kernels.native_ops import NativeOps

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default}
_CONSTANTS = {_aten.lift.default, _aten.lift_fresh.default}
"""What ``torch.tensor`` made of numbers, looking like a view."""
_LINE = 64


class NotRecordable(Exception):
    """A layer does what a layer graph does not hold."""


class TooLarge(NotRecordable):
    """It needs more memory than there is, at this size."""


@dataclass
class _Made:
    """A tensor that is made while recording: its address, its bytes, and the first and last call that uses it."""

    tensor: torch.Tensor
    first: int = -1
    last: int = -1

    @property
    def begin(self) -> int:
        return self.tensor.data_ptr()

    @property
    def size(self) -> int:
        return -(-self.tensor.nbytes // _LINE) * _LINE


class GraphRecorder(TorchDispatchMode):
    """Records the calls of one model's launcher, new tensors, sums, products with a number.

    Any other operation that computes is the ``problem``.
    """

    def __init__(self, launch: Launcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launch, self._ops = launch, NativeOps(launch)
        self.calls: list[Call] = []
        self.made: list[_Made] = []
        self.problem: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.add.Tensor and not kwargs and _alike(*args):
            x, other = args
            y = torch.empty_like(x)
            self.made.append(_Made(y))
            self._ops.add(x, other, y)
            return y
        if func is _aten.mul.Tensor and not kwargs and isinstance(args[1], float) and _alike(args[0], args[0]):
            x, factor = args
            y = torch.empty_like(x)
            self.made.append(_Made(y))
            self._ops.scale(x, factor, y)
            return y
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.made.append(_Made(result))
        elif func in _CONSTANTS or func._schema.is_mutable or not _are_views(result, args):
            self.problem = self.problem or str(func)
        return result

    def record(self, function: Callable[[], Any]) -> Any:
        with self.launch.recording() as self.calls, self:
            return function()


def _are_views(result: Any, args: Any) -> bool:
    """Whether results are other looks at the memory of a tensor that was given, so that nothing was computed."""
    given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
    found = result if isinstance(result, tuple | list) else [result]
    return all(isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() in given for one in found)


def _alike(x: Any, other: Any) -> bool:
    both = isinstance(x, torch.Tensor) and isinstance(other, torch.Tensor)
    return (
        both
        and x.shape == other.shape
        and x.is_contiguous()
        and other.is_contiguous()
        and x.dtype == other.dtype == torch.float32
    )


class LayerGraph:
    """Calls of native kernels, one after another.

    ``records`` are int64, one behind the other; ``table`` int64 [calls, 2] has each one's code and address. ``places``
    int64 [n, 3] are the fields of records that point into inputs: their address, which input, and how far into
    it. Behind the inputs comes the result.
    """

    def __init__(
        self,
        launch: Launcher,
        records: Any,
        table: torch.Tensor,
        places: torch.Tensor,
        arena: Arena,
        result: torch.Tensor,
        num_inputs: int,
    ) -> None:
        self.places, self._launch = places, launch
        self._kept = records, table, arena  # whose addresses are in use
        self._shape = result.shape
        self._addresses = (ctypes.c_int64 * (num_inputs + 1))()
        at = ctypes.addressof(self._addresses)
        self._fixed = table.data_ptr(), len(table), places.data_ptr(), len(places), at

    @classmethod
    def of(cls, recorder: GraphRecorder, inputs: Sequence[torch.Tensor], result: Any, arena: Arena) -> LayerGraph:
        """What was recorded for a call with these inputs. Raises ``NotRecordable``."""
        if recorder.problem is not None:
            raise NotRecordable(recorder.problem)
        made = {one.begin: one for one in recorder.made if one.size}
        if not isinstance(result, torch.Tensor) or result.data_ptr() not in made or not result.is_contiguous():
            raise NotRecordable("its result is no new tensor")
        numbers: list[int] = []
        starts = []
        for _, record in recorder.calls:
            starts.append(len(numbers))
            numbers += (ctypes.c_int64 * (ctypes.sizeof(record) // 8)).from_buffer_copy(record)
        ends = [*starts[1:], len(numbers)]
        of_result = made.pop(result.data_ptr())
        if of_result.tensor.nbytes != result.nbytes or result.dtype != torch.float32:
            raise NotRecordable("its result is part of a tensor, or of another format")
        found: dict[int, list[tuple[int, int]]] = {}
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for place in range(start, end):
                for begin, one in made.items():
                    if begin <= numbers[place] < begin + one.size:
                        found.setdefault(begin, []).append((place, numbers[place] - begin))
                        one.first = number if one.first < 0 else one.first
                        one.last = number
        pointing = [_pointing_into(numbers, one) for one in (*inputs, of_result.tensor)]
        offsets = arena.arrange([one for one in made.values() if one.first >= 0])
        for begin, mine in found.items():
            for place, offset in mine:
                numbers[place] = arena.address + offsets[begin] + offset
        memory = (ctypes.c_int64 * len(numbers))(*numbers)
        first = ctypes.addressof(memory)
        rows = [[code, first + 8 * start] for (code, _), start in zip(recorder.calls, starts, strict=True)]
        places = [(first + 8 * place, number, offset) for number, some in enumerate(pointing) for place, offset in some]
        return cls(recorder.launch, memory, torch.tensor(rows), torch.tensor(places), arena, result, len(inputs))

    def replay(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result for other inputs of the same shapes and strides."""
        result = torch.empty(self._shape)
        self._addresses[:] = [one.data_ptr() for one in (*inputs, result)]
        self._launch(REPLAY, torch.get_num_threads(), *self._fixed)
        return result


def _pointing_into(numbers: Sequence[int], tensor: torch.Tensor) -> list[tuple[int, int]]:
    if not tensor.numel():
        return []  # its address is 0
    begin, size = tensor.data_ptr(), tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
    return [(place, number - begin) for place, number in enumerate(numbers) if begin <= number < begin + size]


class Arena:
    """Memory that all layer graphs of a model share, as one at a time is replayed."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.empty(num_bytes + _LINE, dtype=torch.uint8)
        self.address = -(-self._memory.data_ptr() // _LINE) * _LINE
        self.num_bytes = num_bytes

    def arrange(self, made: Sequence[_Made]) -> dict[int, int]:
        """Where each tensor lies, by its address: those that are in use at the same time do not overlap.

        Raises ``TooLarge`` where they do not fit.
        """
        placed: list[tuple[_Made, int]] = []
        for one in sorted(made, key=lambda one: -one.size):
            taken = sorted(
                (offset, offset + other.size)
                for other, offset in placed
                if other.first <= one.last and one.first <= other.last
            )
            offset = 0
            for begin, end in taken:
                if offset + one.size <= begin:
                    break
                offset = max(offset, end)
            if offset + one.size > self.num_bytes:
                raise TooLarge(f"it needs more than {self.num_bytes} bytes")
            placed.append((one, offset))
        return {one.begin: offset for one, offset in placed}


def _replay(a: Any) -> None:
    if thread_number() == 0:
        for number in range(a.num_places):
            place = longs(a.places + 24 * number)
            longs(place[0])[0] = longs(a.inputs)[place[1]] + place[2]
    barrier()
    for number in range(a.count):
        entry = longs(a.table + 16 * number)
        call(entry[0], entry[1])
        barrier()


REPLAY = NativeKernel(_replay, "table count places num_places inputs")
GRAPH_KERNELS = (REPLAY, *NativeOps.GRAPH_KERNELS)
"""What recording and replaying a layer has to have compiled, beside what the layer calls."""
