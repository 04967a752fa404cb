"""What tests need of a CPU: those that need more are deselected, and the summary names what was not tested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Generic, Protocol, TypeVar

import pytest

from cpu_kernels.tiers import OTHER_LIBRARIES, VARIABLE, available_tiers

PRODUCTS = ("AVX-VNNI", "AVX512-VNNI", "AMX")
"""Instruction sets with a native int8 linear, as ``native_linears`` names them."""
NUMBA = "Numba"
"""Native kernels for whatever CPU this is: Numba, and an OpenMP library that torch has loaded."""


def needs(*names: str) -> pytest.MarkDecorator:
    """A mark for tests that need at least one of these."""
    return pytest.mark.needs(*names)


def each_product() -> list[object]:
    """A parameter for every instruction set with a product of its own, its name."""
    return [pytest.param(name, marks=needs(name)) for name in PRODUCTS]


@cache
def on_this_cpu() -> frozenset[str]:
    """All that are there; torch and Numba may be told to use less, see CONTRIBUTING.md."""
    from cpu_kernels.kernels import native_linears
    from cpu_kernels.native_kernel import available

    return frozenset([*native_linears(), *([NUMBA] if available() else [])])


def variables_of(tier: str) -> dict[str, str]:
    """The environment of a process that keeps to a tier, as ``make test CPU=...`` does."""
    return {VARIABLE: tier, **OTHER_LIBRARIES[tier]}


class _Marked(Protocol):
    def iter_markers(self, name: str) -> Iterator[pytest.Mark]: ...


_Test = TypeVar("_Test", bound=_Marked)


class Selection(Generic[_Test]):
    """The tests of one run that this CPU can run, and what is told of the others."""

    def __init__(self, items: Sequence[_Test]) -> None:
        self.kept: list[_Test] = []
        self.dropped: list[_Test] = []
        self._named: set[str] = set()
        for item in items:
            needed = [mark.args for mark in item.iter_markers("needs")]
            self._named.update(name for names in needed for name in names)
            can_run = all(not on_this_cpu().isdisjoint(names) for names in needed)
            (self.kept if can_run else self.dropped).append(item)

    def told(self) -> str | None:
        """A line for the summary; None where no test needs anything of the CPU."""
        if not self._named:
            return None
        import torch

        order = [name for name in (NUMBA, *PRODUCTS) if name in self._named]
        tested = [f"torch's {torch.backends.cpu.get_cpu_capability()}", f"C kernels' {', '.join(available_tiers())}"]
        tested += [name for name in order if name in on_this_cpu()]
        missing = [name for name in order if name not in on_this_cpu()]
        line = f"instruction sets tested: {', '.join(tested)}"
        return f"{line}; not on this CPU: {', '.join(missing)}" if missing else line
