"""The operations of one model on a CPU, behind one interface: native kernels where they compile, else torch's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

import torch

from cpu_kernels.attention import Attention
from cpu_kernels.c_kernel import CKernel
from cpu_kernels.int8_weights import QMAX, QMAX_16BIT_SAFE, Int8Rows, Outliers
from cpu_kernels.layer_graph import GRAPH_KERNELS
from cpu_kernels.library import library
from cpu_kernels.linear import (
    FbgemmLinear,
    NativeLinear,
    OnednnLinear,
    PackedLinear,
    choose_torch_linear,
    quieten_deprecations,
)
from cpu_kernels.lora_deltas import ADD_DELTAS, AddDeltas
from cpu_kernels.native_kernel import Launcher, NativeKernel, available
from cpu_kernels.native_ops import NativeOps
from cpu_kernels.self_test import agrees
from cpu_kernels.softmax import SOFTMAX_BLOCKS, SoftmaxRows
from cpu_kernels.torch_ops import TorchOps

if TYPE_CHECKING:
    from cpu_kernels.gemm import GemmKernel
    from cpu_kernels.prompt_attention import PromptAttention

logger = logging.getLogger("quickchange.model")

_TORCH_LINEARS = {linear.name: linear for linear in (FbgemmLinear, OnednnLinear)}


class Norm(Protocol):
    """x * gain / sqrt(mean(x**2) + eps) over the last dimension (Zhang and Sennrich 2019)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> a new [..., dim]."""
        ...

    def of_sum(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x += other, both contiguous [..., dim]; then as a call with x, to the bit."""
        ...


class Kernels:
    """The operations of ONE model, each native or torch's. No caller needs to know which.

    Tensors are float32 on the CPU unless a docstring names another type; no operation checks shapes. ``linear`` is the
    name of the int8 linear (``choose_linear``), None for a base in floats. ``native`` operations are kernels in C, and
    with ``jit`` also kernels that Numba compiles in a thread, that of AMX's attention for keys and values of
    ``kv_dtype``; ``ready`` waits for it.

    Before ``ready`` has returned only ``linear`` and ``qmax`` may be used.
    """

    rms_norm: Callable[[torch.Tensor, float], Norm]
    """``f(gain, eps)``: an RMS norm with this gain [dim]."""

    rotary_embedding: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
    ]
    """``f(q, k, cos, sin)``: new x * cos + rotate_half(x) * sin of both (Su et al. 2021).

    q and k are [1, heads, rows, dim] whose heads are contiguous (``stride(-1) == 1``), cos and sin [1, rows, dim].
    """

    add_: Callable[[torch.Tensor, torch.Tensor], None]
    """``f(x, other)``: x += other, both contiguous and of one shape."""

    silu_and_mul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """``f(gate, up)``: a new silu(gate) * up, all [..., dim]."""

    gelu_and_mul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """``f(gate, up)``: a new gelu(gate) * up, gelu by its tanh approximation, all [..., dim]."""

    add_deltas: AddDeltas | None
    """Adds the LoRA deltas of any mixture of adapters to a linear's rows; None where torch computes them."""

    softmax_rows: Callable[[torch.Tensor, torch.Tensor, Sequence[float]], SoftmaxRows] | None
    """``f(logits, largest, temperatures)``: the weights of rows of logits; None where torch computes them."""

    records_layers: bool
    """Whether a decoder layer may be recorded as a layer graph: its linears, attention, deltas and norms are native."""

    def __init__(
        self,
        *,
        linear: str | None = None,
        native: bool = False,
        jit: bool = True,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.launch = Launcher()
        self.linear_name = linear
        self._kv_dtype = kv_dtype
        self._compiled: dict[NativeKernel | CKernel, bool] = {}
        self._has_library = native and library() is not None
        self._native = self._has_library
        self._jit = native and jit and available()
        self._use_torch()
        if self._native:
            self._use_c()
        self._compiling: threading.Thread | None = None
        if self._jit:
            self._compiling = threading.Thread(target=self._compile, name="compile")
            self._compiling.start()

    @property
    def is_native(self) -> bool:
        """Whether operations are native where they compile; else all are torch's."""
        return self._native

    @property
    def qmax(self) -> int:
        """The largest integer of a weight that ``linear`` multiplies exactly: 127, or 64 on CPUs without VNNI."""
        assert self.linear_name is not None
        return _measured_qmax(self.linear_name)

    def linear(
        self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None
    ) -> PackedLinear:
        """A linear of this weight [out, in], integers of ``-qmax`` to ``qmax``, packed; bias float32 [out]."""
        assert self.linear_name is not None
        if self.linear_name in _TORCH_LINEARS:
            return _TORCH_LINEARS[self.linear_name](rows, bias, outliers)
        return NativeLinear(self.launch, _gemm(self.linear_name), rows, bias, outliers)

    def attention(self, kv_dtype: torch.dtype) -> Attention | None:
        """Attention of any rows, which also writes keys and values into a KV cache of this format.

        None where there is no native kernel for it; torch's attention is then used.
        """
        has_kernel = self._has_library and kv_dtype in Attention.DTYPES
        if not has_kernel or not self._compiles("attention", Attention.KERNEL):
            return None
        return Attention(self.launch)

    def prompt_attention(self, kv_dtype: torch.dtype) -> PromptAttention | None:
        """Attention of many rows of one sequence by AMX on a KV cache of this format; None where there is none."""
        if not self._jit:
            return None
        from cpu_kernels.prompt_attention import PromptAttention

        kernel = PromptAttention.kernel_for(kv_dtype)
        if kernel is None or not self._compiles("prompt attention", kernel):
            return None
        return PromptAttention(self.launch)

    def ready(self, dtype: torch.dtype = torch.float32) -> Kernels:
        """Wait for the compiler. Operations that failed to compile stay torch's; the log names them.

        ``dtype`` is the model's activation type; native operations but for attention are for float32 only.
        """
        if self._compiling is not None:
            self._compiling.join()
            self._compiling = None
        if dtype != torch.float32:
            self._native = self._jit = False
            self._use_torch()
        return self

    def _use_torch(self) -> None:
        ops = TorchOps()
        self.rms_norm, self.rotary_embedding, self.add_ = ops.rms_norm, ops.rotary_embedding, ops.add_
        self.silu_and_mul, self.gelu_and_mul = ops.silu_and_mul, ops.gelu_and_mul
        self.add_deltas = None
        self.softmax_rows = None
        self.records_layers = False

    def _use_c(self) -> None:
        ops = NativeOps(self.launch)
        found = {name for name, kernel in NativeOps.KERNELS.items() if self._compiles(name, kernel) and agrees(name)}
        if "rms_norm" in found:
            self.rms_norm = ops.rms_norm
        if "rotary_embedding" in found:
            self.rotary_embedding = ops.rotary_embedding
        if "add_" in found:
            self.add_ = ops.add_
        if "silu_and_mul" in found:
            self.silu_and_mul = ops.silu_and_mul
        if "gelu_and_mul" in found:
            self.gelu_and_mul = ops.gelu_and_mul
        if self._compiles("LoRA deltas", ADD_DELTAS):
            self.add_deltas = AddDeltas(self.launch)
        if self._compiles("softmax", SOFTMAX_BLOCKS):
            self.softmax_rows = partial(SoftmaxRows, self.launch)

    def _use_jit(self) -> None:
        self.records_layers = (
            self.linear_name is not None
            and self.linear_name not in _TORCH_LINEARS
            and all(self._compiles(name, kernel) and agrees(name) for name, kernel in NativeOps.KERNELS.items())
            and self.add_deltas is not None
            and self.attention(self._kv_dtype) is not None
            and self._compiles("layer graphs", *GRAPH_KERNELS)
        )

    def _compile(self) -> None:
        """Compile all kernels that the model may use except its linears, which ``choose_linear`` compiles."""
        try:
            self._use_jit()
            self.prompt_attention(self._kv_dtype)
        except Exception:  # from an import: _compiles logs compilation errors
            self._jit = self.records_layers = False
            logger.warning("kernels by Numba cannot be imported: layers are not recorded", exc_info=True)

    def _compiles(self, operation: str, *kernels: NativeKernel | CKernel) -> bool:
        """Whether all of these compile; each is compiled once."""
        for kernel in kernels:
            if kernel not in self._compiled:
                self._compiled[kernel] = _compiles(operation, kernel)
        return all(self._compiled[kernel] for kernel in kernels)


def choose_kernels(*, int8: bool, kv_dtype: torch.dtype) -> Kernels:
    """The kernels of a base on the CPU. ``linear_name`` is None where no int8 linear runs on this CPU.

    An int8 base uses every native operation that compiles on this CPU, whichever int8 linear it has. A base in floats
    uses those in C: compiling the others takes about ten seconds at each start.
    """
    if not int8:
        return Kernels(native=True, jit=False)
    linear = choose_linear()
    return Kernels(linear=linear, native=linear is not None, kv_dtype=kv_dtype)


def native_linears() -> Sequence[str]:
    """Names of the native linears that this CPU can run, by instruction set, fastest first."""
    if not available():
        return []
    from cpu_kernels.gemm import gemm_kernels

    return list(gemm_kernels())


def choose_linear() -> str | None:
    """The name of the fastest int8 linear on this CPU, for ``Kernels``; None where there is none."""
    for name in native_linears():
        if _compiles(f"linears by {name}", _gemm(name)):
            return name
    torch_linear = choose_torch_linear()
    return None if torch_linear is None else torch_linear.name


def _gemm(name: str) -> GemmKernel:
    from cpu_kernels.gemm import gemm_kernels

    return gemm_kernels()[name]


@cache
def _measured_qmax(linear: str) -> int:
    """``QMAX`` where a product of the largest integers is exact, else ``QMAX_16BIT_SAFE``."""
    quieten_deprecations()
    num_inputs = 256
    largest_weights = Int8Rows(torch.full((8, num_inputs), QMAX, dtype=torch.int8), torch.full((8,), 1.0 / QMAX))
    sums = Kernels(linear=linear).linear(largest_weights)(torch.ones(1, num_inputs))
    return QMAX if torch.allclose(sums, torch.tensor(float(num_inputs))) else QMAX_16BIT_SAFE


def _compiles(operation: str, kernel: NativeKernel | CKernel) -> bool:
    """Whether a native kernel compiles for this CPU; a failure is logged."""
    try:
        kernel.compile()
    except Exception as error:
        logger.warning(
            "the native kernel for %s could not be compiled (%s: %s): a slower one is used",
            operation,
            type(error).__name__,
            str(error)[:300],
            exc_info=True,
        )
        return False
    return True
