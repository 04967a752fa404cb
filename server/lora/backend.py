"""What adds adapters' low-rank deltas to linears, and what every backend knows of a step: whose rows they are."""

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
    """Rows ``start`` to ``end`` of a batch that all use these adapters; ``whole`` where there are no others."""

    start: int
    end: int
    adapters: tuple[LoRARequest, ...]
    whole: bool = False

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Their part of x [all rows, ...]."""
        return x if self.whole else x[self.start : self.end]

    def add(self, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> None:
        """``y += low @ b`` on these rows, rounded once: y [all rows, out], low [rows, rank], b [rank, out]."""
        part = self.cut(y)
        if y.dtype == torch.float32:
            part.addmm_(low, b)
        else:
            part.add_(low @ b)


class BatchAdapters:
    """The adapters of the rows of the step at hand.

    Most modules get all rows, the head only those that are sampled. ``active`` tells whether any row has an adapter.
    """

    def __init__(self) -> None:
        self.active = False
        self.num_rows = self.num_sampled = 0
        self._runs: dict[int, Sequence[AdapterRun]] = {}

    def begin(self, segments: Sequence[Segment]) -> None:
        """Note the segments of a step, in the order of their rows."""
        rows, sampled = [segment.length for segment in segments], [segment.num_sampled for segment in segments]
        self.num_rows, self.num_sampled = sum(rows), sum(sampled)
        self.active = any(segment.sequence.adapters for segment in segments)
        self._runs = {self.num_sampled: (), self.num_rows: ()}
        if self.active:
            self._runs[self.num_rows] = _runs(segments, rows)
            if self.num_sampled != self.num_rows:
                self._runs[self.num_sampled] = _runs(segments, sampled)

    def runs(self, num_rows: int) -> Sequence[AdapterRun]:
        """The runs of a module that got so many rows."""
        assert num_rows in self._runs, f"a module got {num_rows} rows of a batch of {list(self._runs)}"
        return self._runs[num_rows]


class LoRABackend(Protocol):
    """Adds the plain low-rank deltas of linears. What else adapters change is computed by ``layer``'s modules.

    The engine thread owns it, but for ``pack``. Where ``add`` or ``remove`` fails, ``remove`` can be called again and
    then leaves nothing of the adapter.
    """

    makes_copies: ClassVar[bool]
    """Whether adapters are copied to be computed together."""
    batch: BatchAdapters

    @property
    def num_bytes(self) -> int:
        """Bytes of copies and tables, which come on top of the adapters' own tensors."""

    @property
    def active(self) -> bool:
        """Whether ``apply`` may change anything in the step at hand."""

    @property
    def can_replay(self) -> bool:
        """Whether the adapters of the step are nothing but memory that kernels read: layer graphs may be replayed."""

    @property
    def generation(self) -> int:
        """Another number when what kernels read lies elsewhere, so that recorded layer graphs are void."""

    def pack(self, weights: LoRAWeights) -> LoRAWeights:
        """An adapter's tensors as this backend reads them; packed ones stay as they are. Any thread may do it."""

    def attach(self, module: str) -> bool:
        """A linear is wrapped. False where the base's own product adds its deltas, so that ``apply`` is not called."""

    def detach(self, module: str) -> None:
        """A linear is the base's again; one that never was attached is no error."""

    def add(self, digest: str, weights: LoRAWeights) -> Iterable[torch.Tensor]:
        """Take a packed adapter, whose linears are attached. Tensors that it keeps of the adapter, copies too."""

    def remove(self, digest: str) -> None:
        """Forget an adapter, also one that was half added; one that is not there is no error."""

    def limit(self, max_bytes: int | None) -> None:
        """Copies take at most so many bytes from now on; those beyond are freed."""

    def begin(self, batch: Batch) -> Batch:
        """Prepare a step. The same batch, its segments in the order in which the rows are computed fastest."""

    def apply(self, module: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """``y += x @ a @ b`` on the rows of each adapter: x [..., rows, in], y [rows, out]."""

    def check_integrity(self, digests: Iterable[str], modules: Iterable[str]) -> None:
        """Raise ``IntegrityError`` where it has other adapters, or other attached linears, than these."""


def _runs(segments: Sequence[Segment], counts: Sequence[int]) -> list[AdapterRun]:
    """``counts`` are the rows of each segment."""
    runs, start, num_rows = [], 0, sum(counts)
    for adapters, group in groupby(zip(segments, counts, strict=True), key=lambda pair: pair[0].sequence.adapters):
        end = start + sum(count for _, count in group)
        if adapters and end > start:
            runs.append(AdapterRun(start, end, adapters, whole=end - start == num_rows))
        start = end
    return runs
