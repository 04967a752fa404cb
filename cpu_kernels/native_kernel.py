"""Compiles Python functions to machine code with Numba, and runs them on torch's own OpenMP threads.

``GOMP_parallel`` of the OpenMP library that torch has loaded starts the threads, so that there is one pool, which stays
awake between the operations of a step. Without Numba, or where that library is not found (outside Linux), there are no
native kernels, and torch's operations are used.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_SYMBOLS = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
_compiling = threading.Lock()

Call = tuple[int, ctypes.Structure]
"""The address of a native kernel's code, and the record of arguments of one call."""


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch's own calls reach; None where it is not found.

    In the order of the dynamic linker: first the process's global symbols (torch's library, or one in ``LD_PRELOAD``),
    then what torch is linked to. A library that another package loaded is neither.
    """
    if sys.platform != "linux":
        return None
    for path in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if all(hasattr(library, name) for name in ("GOMP_parallel", *_SYMBOLS)):
            return library
    return None


@cache
def available() -> bool:
    """Whether native kernels can be compiled and run: with torch's OpenMP library, and Numba."""
    if openmp() is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


class NativeKernel:
    """A function of one record of arguments, which every thread of a team calls, and its machine code.

    It has no other state, so models share it. ``fields`` names the int64 fields of the record (counts and addresses),
    ``floats`` the float64 fields after them. ``reorder`` lets LLVM reassociate sums; the order is fixed when the kernel
    is compiled.
    """

    def __init__(self, body: Callable[[Any], None], fields: str, floats: str = "", *, reorder: bool = False) -> None:
        self.name = body.__name__.lstrip("_")
        self.body, self._fastmath = body, {"reassoc", "nsz", "contract"} if reorder else False
        self._integers, self._floats = fields.split(), floats.split()
        members: list[tuple[str, Any]] = [(name, ctypes.c_int64) for name in self._integers]
        members += [(name, ctypes.c_double) for name in self._floats]
        self.num_fields = len(members)
        self.record = type("Record", (ctypes.Structure,), {"_fields_": members})
        self.code = 0
        self._kept: Any = None

    def compile(self) -> None:
        """Compile it now instead of at the first launch; any thread may call this."""
        with _compiling:
            if not self.code:
                self._compile()

    def _compile(self) -> None:
        import numba
        from numba.core import types

        for name in _SYMBOLS:
            _register_symbol(name)
        integers = [(name, types.int64) for name in self._integers]
        record = types.Record.make_c_struct(integers + [(name, types.float64) for name in self._floats])
        body = numba.njit(fastmath=self._fastmath, error_model="numpy")(self.body)

        def run(pointer: Any) -> None:
            body(numba.carray(pointer, 1)[0])

        self._kept = numba.cfunc(types.void(types.CPointer(record)))(run)
        self.code = self._kept.address


class Launcher:
    """Runs the native kernels of ONE model, from one thread at a time, and owns their workspaces.

    Every native call of a model goes through its launcher, so a recorder of layer graphs sees only that model's calls.
    """

    def __init__(self) -> None:
        self._run: Any = None
        self._calls: list[Call] | None = None
        self._workspaces: dict[str, torch.Tensor] = {}

    def __call__(self, kernel: NativeKernel, threads: int, *values: float) -> None:
        """Run a kernel on ``threads`` threads; memory whose addresses are among the values must live until it returns.

        Raises ``TypeError`` where the number of values is not the kernel's number of fields.
        """
        if not kernel.code:
            kernel.compile()
        if len(values) != kernel.num_fields:  # missing fields would be zero, a null pointer
            raise TypeError(f"{kernel.name} takes {kernel.num_fields} arguments after threads, got {len(values)}")
        if self._run is None:
            self._run = _parallel()
        record = kernel.record(*values)
        self._run(kernel.code, ctypes.byref(record), threads, 0)
        if self._calls is not None:
            self._calls.append((kernel.code, record))

    @property
    def is_recording(self) -> bool:
        """Whether calls are being recorded: their arguments must then stay valid for replay."""
        return self._calls is not None

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Append every call to the list until the context ends. Recordings are not nested."""
        assert self._calls is None, "one layer is recorded at a time"
        calls: list[Call] = []
        self._calls = calls
        try:
            yield calls
        finally:
            self._calls = None

    def workspace(self, name: str, num_bytes: int, *, reuse: bool) -> torch.Tensor:
        """uint8 [num_bytes]: with ``reuse`` the same memory in every call with this name, else new memory.

        A workspace is valid until the next request for the same name. With many rows reused memory stays in the caches;
        new memory of tens of megabytes for each layer would take half as long as the products. While calls are recorded
        memory is always new, as a layer graph has to place it.
        """
        if not reuse or self._calls is not None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        kept = self._workspaces.get(name)
        if kept is None or len(kept) < num_bytes:
            kept = self._workspaces[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return kept[:num_bytes]


@cache
def _parallel() -> Any:
    """``GOMP_parallel(code, record, threads, flags)``."""
    library = openmp()
    assert library is not None
    run = library.GOMP_parallel
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return run


@cache
def _register_symbol(name: str) -> None:
    """Register a function of the OpenMP library with LLVM, so that compiled code can call it."""
    import llvmlite.binding

    address = ctypes.cast(getattr(openmp(), name), ctypes.c_void_p).value
    assert address is not None
    llvmlite.binding.add_symbol(name, address)
