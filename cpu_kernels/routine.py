"""Compiles functions of Python to machine code, and runs them on the threads of torch.

Numba compiles; OpenMP's ``GOMP_parallel``, of the very library that torch has loaded, runs. So there is one pool of
threads, which is awake between the operations of a step. Where that library is not found (it is on Linux), or Numba
knows no such CPU, there are no routines, and torch's own operations do the work.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

_SYMBOLS = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


_compiling = threading.Lock()


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch's own calls reach; None where there is none that serves.

    As the dynamic linker binds torch: what is visible to the whole process comes first (torch makes its library so, and
    one in ``LD_PRELOAD`` is), then what torch is linked to. A library that another package loaded is neither.
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
    """Whether there are routines on this machine."""
    if openmp() is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


class Deltas(Protocol):
    """What the adapters of a step's rows add to a product, as its routine is told."""

    def of(self, num_rows: int) -> tuple[int, int]:
        """The addresses of runs and of the product's linears for so many rows, both 0 where none needs them."""
        ...


class Routine:
    """A function of one record of arguments, as every thread of a team calls it.

    ``fields`` are the record's, integers (addresses, too) in the order of the call; ``floats`` follow them. Sums may be
    added up in another order than they are written in where ``reorder``, which is the same order every time.
    ``recorder``, where there is one, is told the code and the record of every call of any routine.
    """

    recorder: ClassVar[Callable[[int, ctypes.Structure], None] | None] = None

    def __init__(self, body: Callable[[Any], None], fields: str, floats: str = "", *, reorder: bool = False) -> None:
        self.__doc__, self.__name__ = body.__doc__, body.__name__
        self._body, self._fastmath = body, {"reassoc", "nsz", "contract"} if reorder else False
        self._integers, self._floats = fields.split(), floats.split()
        members: list[tuple[str, Any]] = [(name, ctypes.c_int64) for name in self._integers]
        members += [(name, ctypes.c_double) for name in self._floats]
        self._num_fields = len(members)
        self._record = type("Record", (ctypes.Structure,), {"_fields_": members})
        self._code = 0
        self._kept: Any = None

    def __call__(self, threads: int, *values: float) -> None:
        """Run it on so many threads; what the values are addresses of must be there until it returns."""
        if not self._code:
            self.compile()  # unless another thread just did
        if len(values) != self._num_fields:  # the rest would be zero, a null pointer
            raise TypeError(f"{self.__name__} takes {self._num_fields} arguments after threads, got {len(values)}")
        record = self._record(*values)
        self._run(self._code, ctypes.byref(record), threads, 0)
        if Routine.recorder is not None:
            Routine.recorder(self._code, record)

    def compile(self) -> None:
        """Compile it now, and not when it is called first; any thread may."""
        with _compiling:
            if not self._code:
                self._compile()

    def _compile(self) -> None:
        import numba
        from numba.core import types

        for name in _SYMBOLS:
            _make_known(name)
        library = openmp()
        assert library is not None
        integers = [(name, types.int64) for name in self._integers]
        record = types.Record.make_c_struct(integers + [(name, types.float64) for name in self._floats])
        body = numba.njit(fastmath=self._fastmath, error_model="numpy")(self._body)

        def run(pointer: Any) -> None:
            body(numba.carray(pointer, 1)[0])

        self._kept = numba.cfunc(types.void(types.CPointer(record)))(run)
        self._run = library.GOMP_parallel
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._run.restype = None
        self._code = self._kept.address


@cache
def _make_known(name: str) -> None:
    """Let compiled code call a function of the OpenMP library."""
    import llvmlite.binding

    address = ctypes.cast(getattr(openmp(), name), ctypes.c_void_p).value
    assert address is not None
    llvmlite.binding.add_symbol(name, address)
