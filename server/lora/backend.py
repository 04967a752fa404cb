"""The interface of LoRA backends, and the adapters of each row of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Protocol

import torch

from server.lora.weights import LoRAWeights
from server.sequence import Batch, LoRARequest, Segment


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """Rows ``start`` to ``end`` of a batch that use the same adapters; ``whole`` if these are all rows."""

    start: int
    end: int
    adapters: tuple[LoRARequest, ...]
    whole: bool = False

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the run in x [all rows, ...]."""
        return x if self.whole else x[self.start : self.end]

    def add(self, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> None:
        """``y += low @ b`` on these rows, rounded once: y [all rows, out], low [rows, rank], b [rank, out]."""
        part = self.cut(y)
        if y.dtype == torch.float32:
            part.addmm_(low, b)
        else:
            part.add_(low @ b)


class BatchAdapters:
    """The adapters of the rows of the current step.

    Most modules receive all rows, the head only those whose logits are needed. ``active``: whether any row has an
    adapter.
    """

    def __init__(self) -> None:
        self.active = False
        self.num_rows = self.num_logits = 0
        self._runs: dict[int, Sequence[AdapterRun]] = {}

    def begin(self, segments: Sequence[Segment]) -> None:
        """Set the segments of a step, in the order of their rows."""
        rows = [segment.length for segment in segments]
        needed = [segment.num_logits for segment in segments]
        self.num_rows, self.num_logits = sum(rows), sum(needed)
        self.active = any(segment.sequence.adapters for segment in segments)
        self._runs = {self.num_logits: (), self.num_rows: ()}
        if self.active:
            self._runs[self.num_rows] = _runs(segments, rows)
            if self.num_logits != self.num_rows:
                self._runs[self.num_logits] = _runs(segments, needed)

    def runs(self, num_rows: int) -> Sequence[AdapterRun]:
        """The runs of a module that received ``num_rows`` rows."""
        assert num_rows in self._runs, f"a module got {num_rows} rows of a batch of {list(self._runs)}"
        return self._runs[num_rows]


class LoRABackend(Protocol):
    """Adds the plain low-rank deltas of linears. The modules of ``layer`` compute all other changes.

    The engine thread owns it; only ``pack`` may run in any thread. If ``add`` or ``remove`` fails, another ``remove``
    leaves nothing of the adapter.
    """

    makes_copies: ClassVar[bool]
    """Whether it copies adapters to compute them together."""
    batch: BatchAdapters

    @property
    def num_bytes(self) -> int:
        """Bytes of copies and tables, without the adapters' own tensors."""

    @property
    def active(self) -> bool:
        """Whether ``apply`` may change anything in the current step."""

    @property
    def can_replay(self) -> bool:
        """Whether layer graphs may be replayed: the step's adapters are only memory that kernels read."""

    @property
    def generation(self) -> int:
        """Changes when memory that kernels read moves, which invalidates recorded layer graphs."""

    def pack(self, weights: LoRAWeights) -> LoRAWeights:
        """An adapter's tensors in the backend's layout; packed ones stay as they are. For any thread."""

    def attach(self, module: str) -> bool:
        """A linear was wrapped. False if the base's packed linear adds its deltas, so that ``apply`` is not called."""

    def detach(self, module: str) -> None:
        """A linear was unwrapped; one that was not attached is no error."""

    def add(self, digest: str, weights: LoRAWeights) -> Iterable[torch.Tensor]:
        """Add a packed adapter, whose linears are attached. Returns the tensors that it keeps, copies included."""

    def remove(self, digest: str) -> None:
        """Remove an adapter, even a partly added one; an unknown one is no error."""

    def limit(self, max_bytes: int | None) -> None:
        """Limit the bytes of copies from now on; copies beyond the limit are freed."""

    def begin_sorted(self, batch: Batch) -> Batch:
        """Begin a step with the batch's segments sorted into the fastest order; returns that batch."""

    def apply(self, module: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """``y += x @ a @ b`` on the rows of each adapter: x [..., rows, in], y [rows, out]."""

    def check_integrity(self, digests: Iterable[str], modules: Iterable[str]) -> None:
        """Raise ``IntegrityError`` if its adapters or attached linears differ from these."""


def _runs(segments: Sequence[Segment], counts: Sequence[int]) -> list[AdapterRun]:
    """``counts`` are the rows of each segment."""
    runs: list[AdapterRun] = []
    start, num_rows = 0, sum(counts)
    for adapters, group in groupby(zip(segments, counts, strict=True), key=lambda pair: pair[0].sequence.adapters):
        end = start + sum(count for _, count in group)
        if adapters and end > start:
            runs.append(AdapterRun(start, end, adapters, whole=end - start == num_rows))
        start = end
    return runs
