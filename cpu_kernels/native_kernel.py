"""Runs native kernels, in C or compiled from Python with Numba, on torch's own OpenMP threads.

``GOMP_parallel`` of the OpenMP library that torch has loaded starts the threads, so that there is one pool, which stays
awake between the operations of a step. Where that library is not found (outside Linux), C kernels run on threads of
their own, and there are none by Numba.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpu_kernels.c_kernel import CKernel
from cpu_kernels.library import library

_SYMBOLS = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
_compiling = threading.Lock()


class Call(NamedTuple):
    """One call: the address of a kernel's code, its record of arguments, and whether it is a C kernel."""

    code: int
    record: bytes
    takes_team: bool


class _Launch(ctypes.Structure):
    """``struct launch`` of ``threads.h``."""

    _fields_ = (
        ("code", ctypes.c_int64),
        ("record", ctypes.c_char_p),
        ("thread_number", ctypes.c_void_p),
        ("num_threads", ctypes.c_void_p),
        ("wait", ctypes.c_void_p),
        ("unused", ctypes.c_int64 * 8),
        ("tickets", ctypes.c_int64),
    )


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
    """A function of one record of arguments, which every thread of a team calls, and its machine code by Numba.

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

    ``tier`` is the instruction set of its C kernels, None for the highest of this CPU. Every native call of a model
    goes through its launcher, so a recorder of layer graphs sees only that model's calls.
    """

    def __init__(self, tier: str | None = None) -> None:
        self._tier = tier
        self._codes: dict[CKernel, int] = {}
        self._run_team: Callable[[int, bytes, int], None] | None = None
        self._run_alone: Callable[[int, bytes], None] | None = None
        self._calls: list[Call] | None = None
        self._workspaces: dict[str, torch.Tensor] = {}

    def __call__(self, kernel: NativeKernel | CKernel, threads: int, *values: float) -> None:
        """Run a kernel on ``threads`` threads; memory whose addresses are among the values must live until it returns.

        Raises ``TypeError`` where the number of values is not the kernel's number of fields.
        """
        if isinstance(kernel, NativeKernel):
            self._run_by_numba(kernel, threads, values)
            return
        code, record = self._call(kernel, values)
        if self._run_team is None:
            self._run_team = _team()
        self._run_team(code, record, threads)

    def alone(self, kernel: CKernel, *values: float) -> None:
        """Run a C kernel on this thread, which keeps Python's lock: for calls of microseconds."""
        code, record = self._call(kernel, values)
        if self._run_alone is None:
            self._run_alone = _alone()
        self._run_alone(code, record)

    def _call(self, kernel: CKernel, values: Sequence[float]) -> tuple[int, bytes]:
        _check_count(kernel, values)
        code = self._codes.get(kernel)
        if code is None:
            code = self._codes[kernel] = kernel.code(self._tier)
        record = kernel.record(*values)
        if self._calls is not None:
            self._calls.append(Call(code, record, takes_team=True))
        return code, record

    def _run_by_numba(self, kernel: NativeKernel, threads: int, values: Sequence[float]) -> None:
        if not kernel.code:
            kernel.compile()
        _check_count(kernel, values)
        record = kernel.record(*values)
        if self._calls is not None:
            self._calls.append(Call(kernel.code, bytes(record), takes_team=False))
        _parallel()(kernel.code, ctypes.byref(record), threads, 0)

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


def _check_count(kernel: NativeKernel | CKernel, values: Sequence[float]) -> None:
    """Missing fields would be zero, a null pointer."""
    if len(values) != kernel.num_fields:
        raise TypeError(f"{kernel.name} takes {kernel.num_fields} arguments after threads, got {len(values)}")


def _team() -> Callable[[int, bytes, int], None]:
    """``f(code, record, threads)``: run a C kernel on torch's threads, or on the library's own without OpenMP."""
    found = library()
    assert found is not None
    if openmp() is None:
        own = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)
        return own(found.function("quickchange_run_on_own_threads"))
    run, enter = _parallel(), found.function("quickchange_run_in_team")
    launch = _Launch(0, None, *(_address(name) for name in _SYMBOLS))
    pointer = ctypes.byref(launch)

    def run_team(code: int, record: bytes, threads: int) -> None:
        launch.code, launch.record = code, record
        run(enter, pointer, threads, 0)

    return run_team


@cache
def _alone() -> Any:
    """``f(code, record)``: run a C kernel on the calling thread, which keeps Python's lock."""
    found = library()
    assert found is not None
    kind = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)
    return kind(found.function("quickchange_run_alone"))


@cache
def _parallel() -> Any:
    """``GOMP_parallel(code, record, threads, flags)``."""
    library = openmp()
    assert library is not None
    run = library.GOMP_parallel
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return run


def _address(name: str) -> int:
    """The address of a function of the OpenMP library."""
    address = ctypes.cast(getattr(openmp(), name), ctypes.c_void_p).value
    assert address is not None
    return address


@cache
def _register_symbol(name: str) -> None:
    """Register a function of the OpenMP library with LLVM, so that compiled code can call it."""
    import llvmlite.binding

    llvmlite.binding.add_symbol(name, _address(name))
