"""What a native kernel is called with, on which threads it runs, and what happens where one cannot be compiled."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_kernels import kernels, native_kernel
from cpu_kernels.attention import Attention
from cpu_kernels.c_kernel import CKernel
from cpu_kernels.gemm import FIELDS
from cpu_kernels.kernels import Kernels
from cpu_kernels.library import library
from cpu_kernels.linear import choose_torch_linear
from cpu_kernels.native_kernel import Launcher, NativeKernel
from cpu_kernels.native_ops import NativeOps
from cpu_kernels.tiers import available_tiers
from server.model.loader import Base, load_base
from tests.instruction_sets import NUMBA, PRODUCTS, needs

pytestmark = needs(NUMBA)


def double(a: Any) -> None:
    """The second field is the first, twice."""
    a.second = 2 * a.first


@pytest.mark.parametrize("values", [(), (1,), (1, 2, 3), (1, 2, 3, 0.5, 0)])
def test_another_number_of_arguments_than_a_kernel_has_is_an_error(values: tuple[float, ...]) -> None:
    """What was left out was 0, which as an address ended the process."""
    launch = Launcher()
    by_numba = NativeKernel(double, "first second third", "factor")
    with pytest.raises(TypeError, match=f"double takes 4 arguments after threads, got {len(values)}"):
        launch(by_numba, 1, *values)
    launch(by_numba, 1, 1, 2, 3, 0.5)
    scale = CKernel("scale", "x y size", "factor")
    for run in (partial(launch, scale, 1), partial(launch.alone, scale)):
        with pytest.raises(TypeError, match=f"scale takes 4 arguments after threads, got {len(values)}"):
            run(*values)
        run(0, 0, 0, 0.5)


@pytest.mark.parametrize(
    ("name", "fields", "floats", "problem"),
    [
        (
            "scale",
            "x size y",
            "factor",
            "field 1 of 'scale' is float \\* y in the library, and .'size'",
        ),
        ("scale", "x y size factor", "", "field 3 of 'scale' is double factor in the library"),
        ("scale", "x y size", "", "field 3 of 'scale' is double factor in the library, and None here"),
        ("scale", "x y size", "factor other", "'scale' has 4 fields in the library, 5 here"),
        ("scal", "x y size", "factor", "has no 'scal'"),
    ],
)
def test_a_record_of_other_fields_than_the_librarys_is_refused(
    name: str, fields: str, floats: str, problem: str
) -> None:
    with pytest.raises(RuntimeError, match=problem):
        CKernel(name, fields, floats).compile()


def test_a_kernel_runs_as_the_tier_of_its_launcher_unless_it_has_its_own() -> None:
    kernel, found = CKernel("add", "x other y size"), library()
    assert found is not None
    for tier in ("generic", available_tiers()[0]):
        entry = found.kernels["add"].code_for(tier)
        assert entry is not None and entry[1] == kernel.code(tier) == kernel.for_tier(tier).code("avx2")


def test_team_calls_run_on_as_many_threads_as_they_are_given() -> None:
    launch = Launcher()
    for threads in (1, 2, 3, 7):
        x, y = torch.randn(40_000), torch.zeros(40_000)
        launch(CKernel("add", "x other y size"), threads, x.data_ptr(), x.data_ptr(), y.data_ptr(), len(x))
        assert torch.equal(y, 2 * x)


def test_kernels_run_on_torchs_threads_whatever_library_was_loaded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the libraries beside torch the first by name was taken, as scikit-learn's: a second team of threads."""
    stock = path_of(native_kernel.openmp())
    other = tmp_path / "scikit_learn.libs" / "libgomp-123.so.9"
    other.parent.mkdir()
    other.write_bytes(stock.read_bytes().replace(b"libgomp.so.1", b"libgomp.so.9"))
    loaded = ctypes.CDLL(str(other))
    assert path_of(loaded) == other
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert path_of(native_kernel.openmp.__wrapped__()) == stock


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


def break_compilation(monkeypatch: pytest.MonkeyPatch, *broken: NativeKernel | CKernel) -> None:
    """Let these fail, and all of them where none is named."""
    for kind in (NativeKernel, CKernel):
        monkeypatch.setattr(kind, "compile", failing(kind.compile, broken))


def failing(stock: Callable[[Any], None], broken: Sequence[Any]) -> Callable[[Any], None]:
    def compile_or_fail(kernel: Any) -> None:
        if not broken or kernel in broken:
            raise RuntimeError("LLVM does not know this CPU")
        stock(kernel)

    return compile_or_fail


def load_int8() -> Base:
    return load_base("micro", name="micro", device="cpu", dtype="auto", max_model_len=64, quantization="int8")


def test_where_linears_cannot_be_compiled_torchs_stand_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server died of it at its start."""
    broken = NativeKernel(double, FIELDS)
    monkeypatch.setattr(kernels, "native_linears", lambda: ["broken"])
    monkeypatch.setattr(kernels, "_gemm", lambda name: broken)
    break_compilation(monkeypatch, broken)
    base = load_int8()
    torchs = choose_torch_linear()
    assert torchs is not None and base.quantized is not None and base.quantized.kernel == torchs.name
    assert base.kernels.add_deltas is not None and not base.kernels.records_layers, "the rest is native"
    assert "linears by broken could not be compiled (RuntimeError: LLVM does not know this CPU)" in caplog.text


@needs(*PRODUCTS)
def test_an_operation_that_cannot_be_compiled_is_torchs_and_the_log_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All others were torch's then, too."""
    norm = NativeOps.KERNELS["rms_norm"]
    break_compilation(monkeypatch, norm, Attention.KERNEL)
    base = load_int8()
    chosen = base.kernels
    assert base.quantized is not None and base.quantized.kernel in PRODUCTS
    assert chosen.attention(base.kv_dtype) is None and chosen.add_deltas is not None
    assert not chosen.records_layers
    x, gain = torch.randn(3, 16), torch.rand(16)
    torch.testing.assert_close(chosen.rms_norm(gain, 1e-5)(x), torch.rms_norm(x, (16,), gain, 1e-5))
    failed = {message.partition(" could not")[0] for message in caplog.messages if "could not be compiled" in message}
    assert failed == {f"the native kernel for {name}" for name in ("rms_norm", "attention")}


def test_where_nothing_can_be_compiled_all_is_torchs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error was lost in its thread, and came again in every step."""
    with caplog.at_level(logging.WARNING):
        assert Kernels(native=True).ready().add_deltas is not None
        assert not caplog.records
        break_compilation(monkeypatch)
        chosen = Kernels(native=True).ready()
    assert chosen.add_deltas is None and chosen.attention(torch.float32) is None
    assert "the native kernel for LoRA deltas could not be compiled (RuntimeError" in caplog.text
    x = torch.randn(3, 16)
    assert chosen.silu_and_mul(x, x).shape == x.shape
