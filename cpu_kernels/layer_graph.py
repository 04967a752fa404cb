"""Records a layer's calls of native kernels, and replays them with other tensors in one call, as CUDA graphs do.

Kernels of a decoding step take microseconds. Between them a step spends most of its time in Python, whose own memory
the weights have just evicted from the caches. Replay makes the same calls without Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpu_kernels.blocks import padded
from cpu_kernels.c_kernel import CKernel
from cpu_kernels.native_kernel import Call, Launcher
from cpu_kernels.native_ops import NativeOps

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default}
_CONSTANTS = {_aten.lift.default, _aten.lift_fresh.default}
"""Operations of ``torch.tensor(numbers)``, which look like views."""
_LINE = 64


class NotRecordable(Exception):
    """The layer has an operation that a layer graph cannot hold."""


class TooLarge(NotRecordable):
    """The layer needs more memory than the arena has, at this number of rows."""


@dataclass
class _NewTensor:
    """A tensor that was created while recording, and the first and last call that use it (-1: none)."""

    tensor: torch.Tensor
    first: int = -1
    last: int = -1

    @property
    def begin(self) -> int:
        return self.tensor.data_ptr()

    @property
    def size(self) -> int:
        return padded(self.tensor.nbytes, _LINE)


class GraphRecorder(TorchDispatchMode):
    """Records one model's kernel calls, new tensors, and torch's ``x + y`` and ``x * number``, replaced by kernels.

    ``problem`` is the first other torch operation that computes something.
    """

    def __init__(self, launch: Launcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launch, self._ops = launch, NativeOps(launch)
        self.calls: list[Call] = []
        self.new_tensors: list[_NewTensor] = []
        self.problem: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.add.Tensor and not kwargs and _alike(*args):
            x, other = args
            y = torch.empty_like(x)
            self.new_tensors.append(_NewTensor(y))
            self._ops.add(x, other, y)
            return y
        if func is _aten.mul.Tensor and not kwargs and isinstance(args[1], float) and _alike(args[0], args[0]):
            x, factor = args
            y = torch.empty_like(x)
            self.new_tensors.append(_NewTensor(y))
            self._ops.scale(x, factor, y)
            return y
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.new_tensors.append(_NewTensor(result))
        elif func in _CONSTANTS or func._schema.is_mutable or not _are_views(result, args):
            self.problem = self.problem or str(func)
        return result

    def record(self, function: Callable[[], Any]) -> Any:
        with self.launch.recording() as self.calls, self:
            return function()


def _are_views(result: Any, args: Any) -> bool:
    """Whether all results are views of the arguments, so that nothing was computed."""
    storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
    results = result if isinstance(result, tuple | list) else [result]
    return all(isinstance(view, torch.Tensor) and view.untyped_storage().data_ptr() in storages for view in results)


def _alike(x: Any, other: Any) -> bool:
    """Whether both are contiguous float32 tensors of one shape."""
    return (
        isinstance(x, torch.Tensor)
        and isinstance(other, torch.Tensor)
        and x.shape == other.shape
        and x.is_contiguous()
        and other.is_contiguous()
        and x.dtype == other.dtype == torch.float32
    )


class LayerGraph:
    """A list of calls of native kernels.

    ``records`` are the records of all calls, int64, contiguous; ``table`` int64 [calls, 3] has each call's code, record
    address and whether it is a C kernel. ``places`` int64 [n, 3] are the fields that point into an input: address of
    the field, number of the input, offset in bytes. The result counts as the last input.
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
        self._kept = records, table, arena  # their addresses are in use
        self._shape = result.shape
        self._addresses = (ctypes.c_int64 * (num_inputs + 1))()
        inputs = ctypes.addressof(self._addresses)
        self._fixed = table.data_ptr(), len(table), places.data_ptr(), len(places), inputs

    @classmethod
    def of(cls, recorder: GraphRecorder, inputs: Sequence[torch.Tensor], result: Any, arena: Arena) -> LayerGraph:
        """The graph of a layer that was recorded with these inputs. Raises ``NotRecordable``."""
        if recorder.problem is not None:
            raise NotRecordable(recorder.problem)
        new_tensors = {tensor.begin: tensor for tensor in recorder.new_tensors if tensor.size}
        if not isinstance(result, torch.Tensor) or result.data_ptr() not in new_tensors or not result.is_contiguous():
            raise NotRecordable("its result is not a new contiguous tensor")
        numbers: list[int] = []
        starts = []
        for call in recorder.calls:
            starts.append(len(numbers))
            numbers += memoryview(call.record).cast("q")
        ends = [*starts[1:], len(numbers)]
        new_result = new_tensors.pop(result.data_ptr())
        if new_result.tensor.nbytes != result.nbytes or result.dtype != torch.float32:
            raise NotRecordable("its result is part of a tensor, or not float32")
        pointers: dict[int, list[tuple[int, int]]] = {}  # per new tensor: fields that point into it, their offsets
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for field in range(start, end):
                for begin, tensor in new_tensors.items():
                    if begin <= numbers[field] < begin + tensor.size:
                        pointers.setdefault(begin, []).append((field, numbers[field] - begin))
                        if tensor.first < 0:
                            tensor.first = number
                        tensor.last = number
        input_pointers = [_pointing_into(numbers, tensor) for tensor in (*inputs, new_result.tensor)]
        arena_offsets = arena.arrange([tensor for tensor in new_tensors.values() if tensor.first >= 0])
        for begin, fields in pointers.items():
            for field, offset in fields:
                numbers[field] = arena.address + arena_offsets[begin] + offset
        records = (ctypes.c_int64 * len(numbers))(*numbers)
        address = ctypes.addressof(records)
        table = [
            [call.code, address + 8 * start, call.takes_team]
            for call, start in zip(recorder.calls, starts, strict=True)
        ]
        places = [
            (address + 8 * field, number, offset)
            for number, fields in enumerate(input_pointers)
            for field, offset in fields
        ]
        return cls(recorder.launch, records, torch.tensor(table), torch.tensor(places), arena, result, len(inputs))

    def replay(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result for other inputs of the same shapes and strides."""
        result = torch.empty(self._shape)
        self._addresses[:] = [tensor.data_ptr() for tensor in (*inputs, result)]
        self._launch(REPLAY, torch.get_num_threads(), *self._fixed)
        return result


def _pointing_into(numbers: Sequence[int], tensor: torch.Tensor) -> list[tuple[int, int]]:
    """The fields that are addresses within the tensor's memory, and their offsets in bytes."""
    if not tensor.numel():
        return []  # its address is 0
    begin, size = tensor.data_ptr(), tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
    return [(field, number - begin) for field, number in enumerate(numbers) if begin <= number < begin + size]


class Arena:
    """Memory that all layer graphs of a model share: one is replayed at a time."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.empty(num_bytes + _LINE, dtype=torch.uint8)
        self.address = padded(self._memory.data_ptr(), _LINE)
        self.num_bytes = num_bytes

    def arrange(self, tensors: Sequence[_NewTensor]) -> dict[int, int]:
        """Offsets in the arena by the tensors' addresses; tensors in use at the same time do not overlap.

        The largest is placed first, each at the lowest offset that is free. Raises ``TooLarge`` where they do not fit.
        """
        placed: list[tuple[_NewTensor, int]] = []
        for tensor in sorted(tensors, key=lambda tensor: -tensor.size):
            taken = sorted(
                (offset, offset + other.size)
                for other, offset in placed
                if other.first <= tensor.last and tensor.first <= other.last
            )
            offset = 0
            for begin, end in taken:
                if offset + tensor.size <= begin:
                    break
                offset = max(offset, end)
            if offset + tensor.size > self.num_bytes:
                raise TooLarge(f"it needs more than {self.num_bytes} bytes")
            placed.append((tensor, offset))
        return {tensor.begin: offset for tensor, offset in placed}


REPLAY = CKernel("replay", "calls num_calls fields num_fields inputs")
GRAPH_KERNELS = (REPLAY, *NativeOps.GRAPH_KERNELS)
"""The kernels that recording and replay need, besides those that the layer calls."""
