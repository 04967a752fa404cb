"""What a routine is called with, on which threads it runs, and what happens where it cannot be compiled."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from cpu_kernels import every, routine
from cpu_kernels.product import FIELDS
from cpu_kernels.routine import Routine
from server.model.attention.cpu import TorchAttention
from server.model.compiling import Compiling
from server.model.loader import Base, load_base
from server.quantization import kernels
from server.quantization.native import NativeKernel
from tests.instruction_sets import NUMBA, PRODUCTS, needs

pytestmark = needs(NUMBA)


def double(a: Any) -> None:
    """The second field is the first, twice."""
    a.second = 2 * a.first


@pytest.mark.parametrize("values", [(), (1,), (1, 2, 3), (1, 2, 3, 0.5, 0)])
def test_another_number_of_arguments_than_a_routine_has_is_an_error(values: tuple[float, ...]) -> None:
    """What was left out was 0, which as an address ended the process."""
    made = Routine(double, "first second third", "factor")
    with pytest.raises(TypeError, match=f"double takes 4 arguments after threads, got {len(values)}"):
        made(1, *values)
    made(1, 1, 2, 3, 0.5)


def test_routines_run_on_torchs_threads_whatever_library_was_loaded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the libraries beside torch the first by name was taken, as scikit-learn's: a second team of threads."""
    stock = path_of(routine.openmp())
    other = tmp_path / "scikit_learn.libs" / "libgomp-123.so.9"
    other.parent.mkdir()
    other.write_bytes(stock.read_bytes().replace(b"libgomp.so.1", b"libgomp.so.9"))
    loaded = ctypes.CDLL(str(other))
    assert path_of(loaded) == other
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert path_of(routine.openmp.__wrapped__()) == stock


def path_of(library: ctypes.CDLL | None) -> Path:
    """The file that a library's function for teams comes from."""
    assert library is not None
    address = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    assert address is not None
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return Path(line.split(maxsplit=5)[5])
    raise AssertionError("the function is in no file")


class Broken(NativeKernel):
    """A product that is not compiled yet."""

    name: ClassVar[str] = "broken"
    routine: ClassVar[Routine] = Routine(double, FIELDS)


def fail(*_: object) -> None:
    raise RuntimeError("LLVM does not know this CPU")


def load_int8() -> Base:
    return load_base("micro", name="micro", device="cpu", dtype="auto", max_model_len=64, quantization="int8")


def test_where_products_cannot_be_compiled_torchs_kernel_stands_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server died of it at its start."""
    monkeypatch.setattr(kernels, "native_kernels", lambda: {"broken": Broken})
    monkeypatch.setattr(Routine, "compile", fail)
    base = load_int8()
    torchs = kernels.choose_torch_kernel()
    assert torchs is not None and base.quantized is not None and base.quantized.kernel == torchs.name
    assert not base.compiled
    assert "products by broken could not be compiled (RuntimeError: LLVM does not know this CPU)" in caplog.text


@needs(*PRODUCTS)
def test_where_other_routines_cannot_be_compiled_torch_does_their_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error was lost in its thread, and came again in every step."""
    monkeypatch.setattr(every, "compile_every_routine", fail)
    base = load_int8()
    assert not base.compiled and base.attention_backend is TorchAttention
    assert base.quantized is not None and base.quantized.kernel in PRODUCTS
    ids = torch.arange(3, 12)[None]
    monkeypatch.undo()
    assert base.model.get_input_embeddings()(ids).isfinite().all()
    assert "could not be compiled (RuntimeError: LLVM does not know this CPU)" in caplog.text


def test_compiling_succeeds_or_says_why_not(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Compiling(torch.float32).succeeded()
        assert not caplog.records
        monkeypatch.setattr(every, "compile_every_routine", fail)
        assert not Compiling(torch.float32).succeeded()
    assert "attention, norms and deltas are torch's" in caplog.text
