"""The calls of an operation and the memory that they name, written for ``kernels_in_c/driver.c``, and read back."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpu_kernels.c_kernel import CKernel
from cpu_kernels.library import library
from cpu_kernels.native_kernel import Launcher, NativeKernel
from cpu_kernels.tiers import LOWER

TIERS = ("generic", "avx2", "avxvnni", "avx512vnni", "amx", "dotprod", "i8mm")
"""In the order of ``enum tier``."""
_NO_BUFFER = -1


class CapturedCalls(TorchDispatchMode):
    """Notes the memory of every tensor that is made or used in it, and the calls of its launchers, which do nothing.

    What a call would write is in memory only after ``run``: an operation is captured that ends with its last call.
    """

    def __init__(self, tier: str) -> None:
        TorchDispatchMode.__init__(self)
        self.tier = tier
        self.calls: list[tuple[CKernel, int, Sequence[float]]] = []
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._storages.setdefault(storage.data_ptr(), storage)
        return result

    def launcher(self) -> Launcher:
        return _CapturingLauncher(self)

    def run(self, command: Sequence[str], folder: Path) -> None:
        """Run the calls by a driver, and put what they wrote into the tensors."""
        calls, results = folder / "calls", folder / "results"
        calls.write_bytes(b"".join(self._written()))
        done = subprocess.run([*command, str(calls), str(results)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}"
        content, at = results.read_bytes(), 0
        for storage in self._storages.values():
            ctypes.memmove(storage.data_ptr(), content[at : at + storage.nbytes()], storage.nbytes())
            at += storage.nbytes()
        assert at == len(content)

    def _written(self) -> Iterator[bytes]:
        contents = [ctypes.string_at(storage.data_ptr(), storage.nbytes()) for storage in self._storages.values()]
        yield _numbers(len(contents))
        for content in contents:
            yield _numbers(len(content)) + content
        inner = [address for number, content in enumerate(contents) for address in self._addresses_in(number, content)]
        yield _numbers(len(inner)) + b"".join(inner)
        yield _numbers(len(self.calls))
        for kernel, threads, values in self.calls:
            yield self._call(kernel, threads, values)

    def _call(self, kernel: CKernel, threads: int, values: Sequence[float]) -> bytes:
        found = library()
        assert found is not None
        tiers = [TIERS.index(name) for name in (kernel.tier or self.tier, *LOWER[kernel.tier or self.tier])]
        written = kernel.name.encode().ljust(64, b"\0") + _numbers(threads, len(tiers), *tiers, len(values))
        for (kind, _), value in zip(found.kernels[kernel.name].fields, values, strict=True):
            if "*" in kind and value:
                place = self._place(int(value))
                assert place is not None, f"{kernel.name} gets memory that no tensor of the capture has"
                written += _numbers(*place)
            elif kind == "double":
                written += _numbers(_NO_BUFFER) + struct.pack("<d", value)
            else:
                written += _numbers(_NO_BUFFER, int(value))
        return written

    def _addresses_in(self, number: int, content: bytes) -> Iterator[bytes]:
        """Eight bytes that are an address in a buffer are taken for one: numbers hardly ever look like it."""
        whole = len(content) // 8
        for index, word in enumerate(struct.unpack_from(f"<{whole}q", content)):
            if word > 1 << 32 and (place := self._place(word)) is not None:
                yield _numbers(number, 8 * index, *place)

    def _place(self, address: int) -> tuple[int, int] | None:
        """The buffer and the offset in it."""
        offsets = [address - storage.data_ptr() for storage in self._storages.values()]
        sizes = [storage.nbytes() for storage in self._storages.values()]
        for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            if 0 <= offset < size or (offset == size and 0 not in offsets):
                return number, offset
        return None


class _CapturingLauncher(Launcher):
    def __init__(self, captured: CapturedCalls) -> None:
        super().__init__(captured.tier)
        self._captured = captured

    def __call__(self, kernel: NativeKernel | CKernel, threads: int, *values: float) -> None:
        assert isinstance(kernel, CKernel)
        self._captured.calls.append((kernel, threads, values))

    def alone(self, kernel: CKernel, *values: float) -> None:
        self(kernel, 1, *values)


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)
